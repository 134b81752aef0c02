"""`dmt export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, Output, QuietOption, grid, human_bytes, make_output, table
from .partition_options import AdapterOption, read_model_options

if TYPE_CHECKING:
    from dmt_convert.bundle import Bundle
    from dmt_convert.serving import Export, ExportConfig, GraphInputs

NAME = "export"
_INPUTS = "What graphs take"
_REQUESTS = "User side once per request"


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle; its weights are shared where they can.")],
    format_: Annotated[
        str, typer.Option("--format", help="What to write.", metavar="onnx|pt2|triton")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize",
            help="How to store tables; what it costs is told before anything is written.",
            metavar="none|fp16|int8|int4",
        ),
    ] = "none",
    max_auc_loss: Annotated[
        float | None,
        typer.Option(
            "--max-auc-loss", min=0, help="Refuse to quantise when more AUC is lost on --data."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Rows to check the graphs on, beside generated ones."),
    ] = None,
    pooling_input: Annotated[
        list[str] | None,
        typer.Option(
            "--pooling-input",
            help="Shape in which ids come: single (B, 1), fixed (B, L), padded (B, L) with -1, "
            "jagged (values and lengths); of all features, or of one as FEATURE=FORM. Repeatable. "
            "[jagged; triton: padded]",
            metavar="[FEATURE=]single|fixed|padded|jagged",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    weighted: Annotated[
        list[str] | None,
        typer.Option(
            "--weighted",
            help="Features whose ids come with weights; * for all. Repeatable.",
            metavar="f,g",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    out_of_range: Annotated[
        str,
        typer.Option(
            "--out-of-range",
            help="What becomes of an id outside its table: the request fails, or the nearest row.",
            metavar="refuse|clip",
            rich_help_panel=_INPUTS,
        ),
    ] = "refuse",
    request_batching: Annotated[
        bool,
        typer.Option(
            "--request-batching",
            help="Towers of one group run once per request, for all candidates together.",
            rich_help_panel=_REQUESTS,
        ),
    ] = False,
    request_group: Annotated[
        str,
        typer.Option(
            "--request-group",
            help="The group, as `dmt convert --group` named it.",
            rich_help_panel=_REQUESTS,
        ),
    ] = "user",
    dense_per_request: Annotated[
        bool,
        typer.Option(
            "--dense-per-request",
            help="Dense inputs come once per request as well.",
            rich_help_panel=_REQUESTS,
        ),
    ] = False,
    model_name: Annotated[
        str, typer.Option("--model-name", help="triton: what the models are called.")
    ] = "dmt",
    gpu: Annotated[bool, typer.Option("--gpu", help="triton, pt2: for serving on a GPU.")] = False,
    checksums: Annotated[
        bool | None,
        typer.Option(
            "--checksums/--no-checksums",
            help="Compare all tables with their digests. [where they have up to 4 GiB in all]",
        ),
    ] = None,
    adapter: AdapterOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write graphs for serving: one per tower, one over them, one whole.

    Every graph is run against the model before it is put in place. Exits with 4 where one differs.

    Example: `dmt export ckpt-dmt16 --format onnx --out served`
    """
    from dmt_convert.bundle import open_bundle
    from dmt_convert.serving import ExportConfig, export_bundle

    output = make_output(json_=json_, quiet=quiet)
    read_model_options(None, adapter)
    opened = open_bundle(bundle)
    form, forms = _forms(pooling_input or ())
    config = ExportConfig(
        format=format_,  # type: ignore[arg-type]
        form=form,  # type: ignore[arg-type]
        forms=forms,  # type: ignore[arg-type]
        weighted=tuple(name for text in weighted or () for name in _names(text)),
        quantize=quantize,  # type: ignore[arg-type]
        out_of_range=out_of_range,  # type: ignore[arg-type]
        per_request=_request_features(opened, request_group) if request_batching else (),
        dense_per_request=dense_per_request,
        model_name=model_name,
        gpu=gpu,
        max_auc_loss=max_auc_loss,
    )
    with output.progress() as progress:
        export = export_bundle(
            opened,
            out,
            config,
            data=data,
            all_digests=checksums,
            on_quality=lambda quality: output.remark(_quality_text(quality)),
            progress=progress,
        )
    _show(output, export, config)


def _forms(texts: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Split `--pooling-input` into the form of all features, and those of single ones."""
    form, forms = None, {}
    for text in texts:
        feature, equals, value = text.rpartition("=")
        if equals:
            forms[feature] = value
        else:
            form = text
    return form, forms


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _request_features(bundle: Bundle, group: str) -> tuple[str, ...]:
    from dmt_convert.errors import ExportError

    groups = bundle.manifest.partition.groups
    if group not in groups:
        known = ", ".join(groups) or "none"
        raise ExportError(
            f"the bundle has no group {group!r} (groups: {known})",
            expected="a group of features that shares no tower with others",
            hint="convert with --group user=f1,f2 --group item=f3,f4, or name another group with "
            "--request-group",
        )
    return tuple(groups[group])


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
            "Checked against the bundle, in a process of its own",
            ["part", "on", "max |diff|>", "allowed>", ""],
            checks,
        ),
    )


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
