"""`dmt export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dmt_convert as dmt
from dmt_convert.config import ExportConfig

from .console import Output, grid, human_bytes, table
from .options import command

if TYPE_CHECKING:
    from dmt_convert.serving import Export, GraphInputs

NAME = "export"


@command(ExportConfig)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle to export.")],
    *,
    config: ExportConfig,
    output: Output,
) -> None:
    """Write graphs for serving: one per tower, one over them, one whole.

    Every graph is run against the model before it is put in place. Exits with 4 if one differs.

    Example: `dmt export ckpt-dmt16 --format onnx --out served`
    """
    with output.progress() as progress:
        export = dmt.export(
            bundle,
            config=config,
            on_quality=lambda quality: output.remark(_quality_text(quality)),
            progress=progress,
        )
    _show(output, export, config)


def _quality_text(quality: Mapping[str, Any]) -> str:
    r2 = quality["logits"]["r2"]
    text = (
        f"tables as {quality['code']}: relative rms error {quality['relative_rms']:.2g}, "
        f"{human_bytes(quality['bytes_before'])} -> {human_bytes(quality['bytes_after'])}; "
        f"logits {'' if r2 is None else f'R^2 {r2:.6f}, '}max |diff| "
        f"{quality['logits']['max_abs_diff']:.2g} on {quality['logits']['rows']} rows"
    )
    if auc := quality.get("auc"):
        text += f"; AUC {auc['before']:.6f} -> {auc['after']:.6f} (lost {auc['lost']:.6f})"
    return text


def _show(output: Output, export: Export, config: ExportConfig) -> None:
    manifest = export.manifest
    shared = [name for name in manifest.weights if (export.path / name).stat().st_nlink > 1]
    graphs = [
        [part, name, human_bytes((export.path / name).stat().st_size)]
        for part, name in manifest.parts.items()
    ]
    size = sum(entry.bytes for entry in manifest.weights.values())
    rows = [
        ("wrote", str(export.path)),
        (
            "weights",
            f"{human_bytes(size)} in {len(manifest.weights)} files, {len(shared)} of them shared "
            "with the bundle",
        ),
        ("takes", _takes(manifest.inputs)),
        ("ids outside", "clipped" if config.out_of_range == "clip" else "refused"),
    ]
    for part, why in manifest.details.get("skipped", {}).items():
        rows.append(("left out", f"the graph {part!r}: {why}"))
    if manifest.quality:
        rows.append(("quantised", _quality_text(manifest.quality)))
    checks = [
        [
            check.part,
            check.what,
            "" if check.max_abs_diff is None else f"{check.max_abs_diff:.2g}",
            "" if check.limit is None else f"{check.limit:.2g}",
            "ok",
        ]
        for check in export.checks
    ]
    output.result(
        {"path": str(export.path), "shared_weights": shared, **manifest.to_json()},
        grid(rows),
        table("\nGraphs", ["part", "file", "size>"], graphs),
        table(
            f"Checked against the bundle, in a process of its own{_ran_on(export)}",
            ["part", "on", "max |diff|>", "allowed>", ""],
            checks,
        ),
    )


def _ran_on(export: Export) -> str:
    found = sorted({check.ran_on for check in export.checks if check.ran_on})
    note = ""
    if export.manifest.gpu and not any("cuda" in name.lower() for name in found):
        note = ": not on a GPU, which ONNX Runtime could not use here"
    return f", on {', '.join(found)}{note}" if found else ""


def _takes(inputs: GraphInputs) -> str:
    counts: dict[str, int] = {}
    for feature in inputs.features:
        form = f"weighted {feature.form}" if feature.weighted else feature.form
        counts[form] = counts.get(form, 0) + 1
    dense = [f"{inputs.dense} (B, {inputs.num_dense})"] if inputs.num_dense else []
    text = ", ".join([*dense, *(f"{count} {form} features" for form, count in counts.items())])
    if inputs.per_request:
        more = " and the dense inputs" if inputs.dense_per_request else ""
        text += f"; once per request: {', '.join(inputs.per_request)}{more}"
    return text
