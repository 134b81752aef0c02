"""`dmt inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dmt_convert as dmt
from dmt_convert.config import InspectConfig

from .console import Output, counted, grid, human_bytes, table
from .options import command

if TYPE_CHECKING:
    from dmt_convert.bundle import Bundle
    from dmt_convert.documents import InputRecord
    from dmt_convert.families import FlatModelInfo
    from dmt_convert.model import DmtSpec
    from dmt_convert.serving import ExportManifest
    from dmt_convert.spec import ModelSpec

NAME = "inspect"
_LISTED = 20
"""Tensors that were passed over and objects that were not read, as far as a table lists them."""


@command(InspectConfig)
def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory, bundle or export.")],
    *,
    config: InspectConfig,
    output: Output,
) -> None:
    """Say what a checkpoint holds: what was read, inferred, assumed.

    Reads headers only, whatever the checkpoint's size.

    Example: `dmt inspect model.pt`
    """
    from dmt_convert.families import FlatModelInfo

    found = dmt.inspect(source, config=config)
    if isinstance(found, dmt.Bundle):
        _show_bundle(output, found)
    elif isinstance(found, FlatModelInfo):
        output.result(_as_json(found), *_tables(found))
    else:
        _show_export(output, source, found)


def _as_json(info: FlatModelInfo) -> dict[str, Any]:
    return {
        "format": info.checkpoint.format,
        "files": [
            {"path": str(path), "bytes": path.stat().st_size} for path in info.checkpoint.files
        ],
        "bytes": info.checkpoint.nbytes,
        "spec": info.spec.to_json(),
        "facts": [asdict(fact) for fact in info.facts],
        "tensors": {
            name: {"source": tensor.path, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in info.tensors.items()
        },
        "optimizer_state": {name: tensor.path for name, tensor in info.row_state.items()},
        "accumulators": {name: tensor.path for name, tensor in info.accumulators.items()},
        "ignored": list(info.ignored),
        "ignored_tensors": [asdict(tensor) for tensor in info.ignored_tensors],
        "unread": dict(info.checkpoint.unread),
        "scalars": {key: _plain(value) for key, value in info.checkpoint.scalars.items()},
    }


def _plain(value: object) -> object:
    """NaN and Inf are not JSON."""
    finite = not isinstance(value, float) or value - value == 0
    return value if finite else str(value)


def _dense_part(spec: ModelSpec) -> list[tuple[str, str]]:
    network = spec.interaction.network
    if network is not None:
        return [
            ("dense inputs", str(spec.num_dense)),
            ("dense part", f"network {network.file or network.name}"),
        ]
    return [
        ("dense_arch", " -> ".join(map(str, spec.dense_arch.widths))),
        ("interaction", spec.interaction.kind),
        ("over_arch", " -> ".join(map(str, spec.over_arch.widths))),
    ]


def _tables(info: FlatModelInfo) -> list[Any]:
    spec, checkpoint = info.spec, info.checkpoint
    rows = [
        (
            "checkpoint",
            f"{checkpoint.source} ({checkpoint.format}, {counted(len(checkpoint.files), 'file')}, "
            f"{human_bytes(checkpoint.nbytes)})",
        ),
        *_dense_part(spec),
        ("tables", f"{len(spec.tables)}, {human_bytes(sum(t.nbytes for t in spec.tables))}"),
        *_fed_by(info.inputs),
        ("optimizer state", f"found for {len(info.row_state)} of {len(spec.tables)} tables"),
        ("accumulators", f"Adagrad's, which bundles keep, for {len(info.accumulators)} of these"),
        *(("not used", line) for line in info.ignored),
        *(("passed over", f"{t.name}: {t.reason}") for t in info.ignored_tensors[:_LISTED]),
        *(("not read", f"{path}: {what}") for path, what in [*checkpoint.unread.items()][:_LISTED]),
    ]
    facts = [[fact.subject, fact.value, fact.source, fact.reason] for fact in info.facts]
    features, tables = [], spec.tables_by_feature
    for feature in spec.features:
        of = tables[feature.name]
        features.append(
            [
                feature.name,
                of.name,
                f"{of.rows:,}",
                str(of.dim),
                of.dtype,
                feature.pooling,
                human_bytes(of.nbytes),
            ]
        )
    columns = ["feature", "table", "rows>", "dim>", "type", "pooling", "size>"]
    return [
        grid(rows),
        table("\nWhat is known, and how", ["what", "value", "how", "why"], facts),
        table("Features, in interaction order", columns, features),
    ]


def _fed_by(inputs: InputRecord | None) -> list[tuple[str, str]]:
    """Say which columns of data feed a model, if that is known."""
    from dmt_convert.data import describe_inputs

    return [] if inputs is None else [("columns", describe_inputs(inputs))]


def _show_bundle(output: Output, bundle: Bundle) -> None:
    manifest = bundle.manifest
    model = manifest.model
    rows = [
        ("bundle", str(bundle.path)),
        ("made of", f"{manifest.source.name} ({manifest.source.format})"),
        ("by", f"dmt-convert {manifest.tool.version}"),
        ("towers", str(len(model.towers))),
        ("tower module", model.kind),
        ("compression", f"{model.compression:.2f}"),
        ("initialised", manifest.initialisation.method),
        ("optimizer state", f"accumulators of {len(bundle.accumulators)} tables"),
        *_fed_by(manifest.inputs),
    ]
    towers = []
    for t, tower in enumerate(model.towers):
        size = manifest.weights[f"weights/tower_{t:03d}.safetensors"].bytes
        width = sum(model.tower_dims(t))
        towers.append(
            [
                str(t),
                str(len(tower.features)),
                f"{width} -> {model.tower_widths[t]}",
                _sends(model, t),
                human_bytes(size),
                ", ".join(tower.features),
            ]
        )
    output.result(
        {"path": str(bundle.path), **manifest.to_json()},
        grid(rows),
        table("\nTowers", ["tower", "features>", "emits", "sends", "size>", "names"], towers),
    )


def _sends(model: DmtSpec, index: int) -> str:
    """Say what a tower sends per sample."""
    tower = model.towers[index]
    if tower.everywhere:
        return "nothing, on every rank"
    code = tower.module.code
    form = "fp32" if code is None else code.describe(model.tower_widths[index])
    return f"{model.tower_bytes[index]} B ({form})"


def _show_export(output: Output, path: Path, manifest: ExportManifest) -> None:
    rows = [
        ("export", f"{path} ({manifest.format})"),
        ("made of", manifest.bundle.name),
        ("by", f"dmt-convert {manifest.tool.version}"),
        ("tables", manifest.quantize if manifest.quantize != "none" else "as in the bundle"),
        ("ids outside", "clipped" if manifest.out_of_range == "clip" else "refused"),
        ("checks passed", str(len(manifest.checks))),
        *_fed_by(manifest.columns),
    ]
    tower_of = manifest.model.assignment.tower_of
    gives = {
        sent.part: f"{sent.dtype} (B, {sent.columns})" + (", on every host" * sent.everywhere)
        for sent in manifest.towers
    }
    graphs = [[part, file, gives.get(part, "")] for part, file in manifest.parts.items()]
    inputs = [
        [", ".join(f.names), f.form, str(manifest.model.flat.table_of(f.feature).rows - 1), str(t)]
        for f in manifest.inputs.features
        for t in (tower_of[f.feature],)
    ]
    output.result(
        {"path": str(path), **manifest.to_json()},
        grid(rows),
        table("\nGraphs", ["part", "file", "gives"], graphs),
        table("Inputs, beside the dense one", ["tensors", "form", "last id>", "tower>"], inputs),
    )
