"""`dmt verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dmt_convert as dmt
from dmt_convert.config import VerifyConfig

from .console import Output, grid, table
from .options import command

if TYPE_CHECKING:
    from dmt_convert.scoring import Check, VerifyReport

NAME = "verify"


@command(VerifyConfig)
def run(
    a: Annotated[Path, typer.Argument(help="Reference: flat checkpoint, bundle or export.")],
    b: Annotated[Path, typer.Argument(help="The other: flat checkpoint, bundle or export.")],
    *,
    config: VerifyConfig,
    output: Output,
) -> None:
    """Check that two models give the same logits; name the first stage that differs.

    Exits with 4 if they differ.

    Example: `dmt verify ckpt.pt ckpt-dmt16 --data clicks/test.npz`
    """
    with output.progress() as progress:
        report = dmt.verify(a, b, config=config, progress=progress)
    _show(output, report)
    if not report.same:
        raise typer.Exit(4)


def _verdict(check: Check) -> str:
    if check.identical:
        return "identical"
    verdict = "within tolerance" if check.equal else "DIFFERS"
    return f"{verdict}, {check.at_edges} at the next level" if check.at_edges else verdict


def _show(output: Output, report: VerifyReport) -> None:
    first = report.first_difference
    value: dict[str, Any] = {
        "same": report.same,
        "first_difference": None if first is None else first.stage,
        "data": report.data,
        "atol": report.atol,
        "rtol": report.rtol,
        "checks": [asdict(check) for check in report.checks],
        "skipped": list(report.skipped),
    }
    shown = [c for c in report.checks if not c.stage.startswith("pooled") or not c.equal]
    pooled = [c for c in report.checks if c.stage.startswith("pooled") and c.equal]
    lines = [
        [
            c.stage,
            f"{c.max_abs_diff:.3g}",
            f"{c.scale:.3g}",
            _verdict(c),
        ]
        for c in shown
    ]
    if pooled:
        worst = max(c.max_abs_diff for c in pooled)
        how = "identical" if all(c.identical for c in pooled) else "within tolerance"
        lines.insert(
            0,
            [
                f"pooled embeddings of {len(pooled)} features",
                f"{worst:.3g}",
                f"{max(c.scale for c in pooled):.3g}",
                how,
            ],
        )
    verdict = "the same" if first is None else f"different, first at: {first.stage}"
    rows = [
        ("verdict", verdict),
        ("on", report.data),
        ("tolerance", f"{report.atol:g} + {report.rtol:g} x the stage's largest value"),
    ]
    if first is not None and report.remark:
        rows.append(("remark", report.remark))
    columns = ["stage", "max |diff|>", "largest value>", ""]
    output.result(value, grid(rows), table("", columns, lines))
