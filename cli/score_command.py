"""`dmt score`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import ScoreConfig

from .console import Output, grid
from .options import command

NAME = "score"


@command(ScoreConfig)
def run(
    model: Annotated[Path, typer.Argument(help="Flat checkpoint, bundle or export.")],
    *,
    config: ScoreConfig,
    output: Output,
) -> None:
    """Compute a model's logits, one per row of a data set.

    Example: `dmt score ckpt-dmt16 --data clicks/test.npz --out scores.npz`
    """
    with output.progress() as progress:
        scores = dmt.score(model, config=config, progress=progress)
    truth = scores.agreement
    value = {
        "out": None if scores.path is None else str(scores.path),
        "rows": scores.rows,
        "rows_per_s": scores.rows_per_s,
        "truth": None if truth is None else asdict(truth),
        "truth_scale": scores.truth_scale,
        "inputs": asdict(scores.inputs),
    }
    rows = [("wrote", str(scores.path))] if scores.path is not None else []
    rows.append(("rows", f"{scores.rows:,} ({scores.rows_per_s:,.0f} per second)"))
    if truth is not None:
        rows.append(
            (
                "original logits",
                f"max |diff| {truth.max_abs_diff:.3g} at a scale of "
                f"{scores.truth_scale:.3g}, R^2 {truth.r2:.9f}",
            )
        )
    output.result(value, grid(rows))
