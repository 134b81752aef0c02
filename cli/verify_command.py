"""`dmt verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, Output, QuietOption, grid, make_output, table
from .partition_options import AdapterOption, ModelConfigOption, read_model_options

if TYPE_CHECKING:
    from dmt_convert.scoring import ScoredModel, VerifyReport

NAME = "verify"


def run(
    a: Annotated[Path, typer.Argument(help="Reference: flat checkpoint, bundle or export.")],
    b: Annotated[Path, typer.Argument(help="The other: flat checkpoint, bundle or export.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows to run on. [generated rows]")
    ] = None,
    atol: Annotated[
        float | None, typer.Option("--atol", min=0, help="Absolute tolerance. [1e-6]")
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option("--rtol", min=0, help="Tolerance, times a stage's largest value. [1e-5]"),
    ] = None,
    checksums: Annotated[
        bool,
        typer.Option(
            "--checksums", help="Also read every byte of a bundle or export and check its digests."
        ),
    ] = False,
    model_config: ModelConfigOption = None,
    adapter: AdapterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that two models give the same logits; name the first stage that differs.

    Exits with 4 where they differ.

    Example: `dmt verify ckpt.pt ckpt-dmt16 --data clicks/test.npz`
    """
    from dmt_convert.bundle import check_digests
    from dmt_convert.scoring import DEFAULT_ATOL, DEFAULT_RTOL, open_model, verify_models
    from dmt_convert.serving import check_export_digests, is_export

    output = make_output(json_=json_, quiet=quiet)
    config = read_model_options(model_config, adapter)
    models = (open_model(a, config), open_model(b, config))
    with output.progress() as progress:
        for model in models if checksums else ():
            if model.bundle is not None:
                check_digests(model.bundle)
            elif is_export(model.path):
                check_export_digests(model.path)
        report = verify_models(
            *models,
            data=data,
            atol=DEFAULT_ATOL if atol is None else atol,
            rtol=DEFAULT_RTOL if rtol is None else rtol,
            on_rows=lambda done, total: progress("scoring", done, total),
        )
    _show(output, report, *models)
    if not report.same:
        raise typer.Exit(4)


def _show(output: Output, report: VerifyReport, reference: ScoredModel, other: ScoredModel) -> None:
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
            "identical" if c.identical else ("within tolerance" if c.equal else "DIFFERS"),
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
    if first is not None and (remark := _remark(reference, other)):
        rows.append(("remark", remark))
    columns = ["stage", "max |diff|>", "largest value>", ""]
    output.result(value, grid(rows), table("", columns, lines))


def _remark(reference: ScoredModel, other: ScoredModel) -> str | None:
    """Say why the models may well differ, where that is known."""
    if other.quantised:
        return (
            f"the tables of {other.path.name} are quantised ({other.quantised}), so logits agree "
            "but are not the same; its export.json says what that costs"
        )
    towers = other.towers
    if towers is None or towers.is_passthrough or reference.towers is not None:
        return None
    return (
        f"the tower modules of {other.path.name} compress {towers.compression:.2f}x, so logits "
        "agree but are not the same; `--tower-module passthrough` is exact"
    )
