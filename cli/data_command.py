"""`dmt data`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dmt_convert as dmt
from dmt_convert.config import DataConfig

from .console import Output, counted, grid, table, visible
from .options import command

if TYPE_CHECKING:
    from dmt_convert.data import DataReport

NAME = "data"


@command(DataConfig)
def run(
    model: Annotated[Path, typer.Argument(help="Flat checkpoint, bundle or export.")],
    data: Annotated[Path, typer.Argument(help="Data set.")],
    *,
    config: DataConfig,
    output: Output,
) -> None:
    """Say what a data set would feed a model, column by column.

    Exits with 3 if the model cannot be fed these data; all faults are listed.

    Example: `dmt data ckpt.pt clicks/test.npz`
    """
    with output.progress() as progress:
        report = dmt.check_data(model, data, config=config, progress=progress)
    output.result(_as_json(report), *_tables(report))
    if not report.usable:
        for fault in report.faults:
            print(f"error: {visible(str(fault))}", file=sys.stderr)
        raise typer.Exit(3)


def _as_json(report: DataReport) -> dict[str, Any]:
    return {
        "usable": report.usable,
        "data": str(report.path),
        "format": report.format,
        "rows": report.rows,
        "checked_rows": report.checked_rows,
        "inputs": None if report.inputs is None else asdict(report.inputs),
        "features": [asdict(column) for column in report.features],
        "dense": [asdict(column) for column in report.dense],
        "positive_share": report.positive_share,
        "unused": dict(report.unused),
        "notes": list(report.notes),
        "faults": [fault.to_json() for fault in report.faults],
    }


def _tables(report: DataReport) -> list[Any]:
    labels, count = report.positive_share, len(report.faults)
    rows = [
        ("data", f"{report.path} ({report.format or 'cannot be opened'})"),
        ("rows", f"{report.rows:,}, {report.checked_rows:,} of them read"),
        ("labels", "-" if labels is None else f"{labels:.2%} are 1"),
        *(("note", note) for note in report.notes),
        ("verdict", "can be used" if report.usable else f"{counted(count, 'fault')}, see below"),
    ]
    tables = [grid(rows)]
    if report.features:
        tables.append(_features(report))
    if report.dense:
        tables.append(_dense(report))
    if report.unused:
        columns = [[name, kind] for name, kind in report.unused.items()]
        title = "Columns that feed nothing" if report.features else "Columns"
        tables.append(table(title, ["column", "type"], columns))
    return tables


def _features(report: DataReport) -> Any:
    lines = [
        [
            column.column,
            column.feeds,
            column.type,
            "-" if column.min is None else str(column.min),
            "-" if column.max is None else str(column.max),
            f"{column.table_rows:,}",
            f"{column.empty_share:.1%}",
            f"{column.ids_per_row:.2f}",
            f"{column.out_of_range:,}" if column.out_of_range else "",
            "" if column.first_out_of_range is None else str(column.first_out_of_range),
        ]
        for column in report.features
    ]
    columns = ["column", "feeds", "type", "min>", "max>", "table rows>", "empty>", "ids per row>"]
    return table("\nColumns of ids", [*columns, "outside>", "first row>"], lines)


def _dense(report: DataReport) -> Any:
    lines = [
        [
            column.column,
            column.feeds,
            column.type,
            *(f"{v:.4g}" for v in (column.min, *column.quantiles, column.max, column.mean)),
        ]
        for column in report.dense
    ]
    columns = ["min>", "1%>", "25%>", "50%>", "75%>", "99%>", "max>", "mean>"]
    return table("Dense inputs, as they are fed", ["column", "feeds", "type", *columns], lines)
