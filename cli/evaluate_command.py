"""`dmt evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import EvaluateConfig

from .console import Output, grid, number
from .options import command

NAME = "evaluate"


@command(EvaluateConfig)
def run(
    model: Annotated[Path, typer.Argument(help="Flat checkpoint, bundle or export.")],
    *,
    config: EvaluateConfig,
    output: Output,
) -> None:
    """Measure a model on labelled data: AUC, log loss, normalised entropy.

    Example: `dmt evaluate ckpt.pt --data clicks/test.npz`
    """
    with output.progress() as progress:
        found = dmt.evaluate(model, config=config, progress=progress)
    rows = [
        ("AUC", number(found.auc)),
        ("log loss", number(found.log_loss)),
        ("NE", number(found.ne)),
        ("rows", f"{found.rows:,} ({found.rows_per_s:,.0f} per second)"),
    ]
    output.result(asdict(found), grid(rows))
