"""`dmt evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, QuietOption, grid, make_output, number
from .partition_options import AdapterOption, ModelConfigOption, read_model_options

NAME = "evaluate"


def run(
    model: Annotated[Path, typer.Argument(help="Flat checkpoint, bundle or export.")],
    data: Annotated[Path, typer.Option("--data", help="Data set with labels.")],
    model_config: ModelConfigOption = None,
    adapter: AdapterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on labelled data: AUC, log loss, normalised entropy.

    Example: `dmt evaluate ckpt.pt --data clicks/test.npz`
    """
    from dmt_convert.scoring import evaluate_model, open_model

    output = make_output(json_=json_, quiet=quiet)
    config = read_model_options(model_config, adapter)
    opened = open_model(model, config)
    with output.progress() as progress:
        found = evaluate_model(
            opened, data, on_rows=lambda done, total: progress("scoring", done, total)
        )
    rows = [
        ("AUC", number(found.auc)),
        ("log loss", number(found.log_loss)),
        ("NE", number(found.ne)),
        ("rows", f"{found.rows:,} ({found.rows_per_s:,.0f} per second)"),
    ]
    output.result(asdict(found), grid(rows))
