"""`dmt score`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, QuietOption, grid, make_output
from .partition_options import AdapterOption, ModelConfigOption, read_model_options

NAME = "score"


def run(
    model: Annotated[Path, typer.Argument(help="Flat checkpoint, bundle or export.")],
    data: Annotated[Path, typer.Option("--data", help="Data set, or a probe npz.")],
    out: Annotated[Path, typer.Option("--out", help="npz to write, with the array `logits`.")],
    model_config: ModelConfigOption = None,
    adapter: AdapterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a model's logits, one per row of a data set.

    Example: `dmt score ckpt-dmt16 --data clicks/test.npz --out scores.npz`
    """
    from dmt_convert.scoring import open_model, score_to_file

    output = make_output(json_=json_, quiet=quiet)
    config = read_model_options(model_config, adapter)
    opened = open_model(model, config)
    with output.progress() as progress:
        report = score_to_file(
            opened, data, out, on_rows=lambda done, total: progress("scoring", done, total)
        )
    value = {**asdict(report), "out": str(report.out)}
    rows = [
        ("wrote", str(report.out)),
        ("rows", f"{report.rows:,} ({report.rows_per_s:,.0f} per second)"),
    ]
    if report.truth is not None and report.truth_scale is not None:
        rows.append(
            (
                "original logits",
                f"max |diff| {report.truth.max_abs_diff:.3g} at a scale of "
                f"{report.truth_scale:.3g}, R^2 {report.truth.r2:.9f}",
            )
        )
    output.result(value, grid(rows))
