"""`dmt convert`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dmt_convert as dmt
from dmt_convert.config import ConvertConfig
from dmt_convert.errors import UsageError

from .console import Output, grid, human_bytes, number, table
from .options import command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmt_convert.bundle import Bundle
    from dmt_convert.conversion import Preview
    from dmt_convert.documents import Frontier, PartitionRecord, Quality
    from dmt_convert.model import DmtSpec, TowerModuleSpec

NAME = "convert"


@command(ConvertConfig)
def run(
    source: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    *,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done: read headers, write nothing."),
    ] = False,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Measure what fewer bytes between hosts cost, from none to 128 times fewer, and "
            "write no bundle.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw --frontier.", metavar="FILE.svg|png"),
    ] = None,
    config: ConvertConfig,
    output: Output,
) -> None:
    """Convert a flat checkpoint into a Disaggregated Multi-Tower bundle.

    The bundle holds the weights of every tower, a plan that puts towers on hosts, and a report
    that says what compression cost. Tables are streamed, so memory does not grow with their size.

    For example:

    `dmt convert ckpt.pt --towers 16`

    `dmt convert ckpt.pt --towers 16 --tower-module passthrough --out exact`

    `dmt convert ckpt.pt --towers 4 --compression 4 --calibration clicks/valid.npz`

    `dmt convert ckpt.pt --towers 4 --frontier`
    """
    if dry_run and frontier:
        raise UsageError("--dry-run and --frontier together", expected="one of them")
    if plot is not None and not frontier:
        raise UsageError(f"--plot {plot.name} without anything to draw: add --frontier")
    if frontier:
        with output.progress() as progress:
            found = dmt.frontier(source, plot=plot, config=config, progress=progress)
        _show_frontier(output, found, plot)
        return
    if dry_run:
        _show_preview(output, dmt.preview(source, config=config))
        return
    with output.progress() as progress:
        bundle = dmt.convert(source, config=config, progress=progress)
    _show_bundle(output, source, bundle)


def _show_preview(output: Output, preview: Preview) -> None:
    from dmt_convert.documents import to_json

    spec, module = preview.flat.spec, preview.modules[0]
    towers = None if preview.partition is None else preview.partition.assignment.towers
    value = {
        "dry_run": True,
        "out": str(preview.out),
        "spec": spec.to_json(),
        "facts": [asdict(fact) for fact in preview.flat.facts],
        "ignored_tensors": [asdict(tensor) for tensor in preview.flat.ignored_tensors],
        "towers": preview.num_towers,
        "assignment": towers,
        "tower_module": to_json(module),
        "alternatives": [to_json(other) for other in preview.modules[1:]],
        "on_every_rank": list(preview.replicated),
        "compression": preview.compression,
        "table_bytes": preview.table_bytes,
        "accumulator_bytes": preview.accumulator_bytes,
        "weight_bytes": preview.weight_bytes,
        "memory_bytes": dict(preview.memory_bytes),
        "free_memory_bytes": preview.free_memory_bytes,
    }
    facts = [[f.subject, f.value, f.source, f.reason] for f in preview.flat.facts]
    rows = [
        ("would write", str(preview.out)),
        ("tables", f"{len(spec.tables)}, {human_bytes(preview.table_bytes)}"),
        ("accumulators", human_bytes(preview.accumulator_bytes)),
        ("other weights", human_bytes(preview.weight_bytes)),
        ("memory", _memory_text(preview)),
        ("features", f"{len(spec.features)} in {preview.num_towers} towers"),
        *((("on every rank", ", ".join(preview.replicated)),) if preview.replicated else ()),
        ("tower module", _module_text(module)),
        *(("  or", _module_text(other)) for other in preview.modules[1:]),
        ("compression", f"{preview.compression:.2f}"),
        ("towers", "found from the weights when converting" if towers is None else ""),
        *((f"  tower {t}", ", ".join(names)) for t, names in enumerate(towers or ())),
    ]
    facts_table = table("\nWhat is known, and how", ["what", "value", "how", "why"], facts)
    output.result(value, grid(rows), facts_table)


def _show_frontier(output: Output, found: Frontier, plot: Path | None) -> None:
    columns = ["what crosses hosts", "--compression>", "bytes>", "R^2>"]
    columns += ["AUC lost>", "at most>"] if found.labelled else []
    columns += ["MFLOP>"]
    lines = []
    for point in (*found.points, *found.flat):
        flat = point in found.flat
        marks = "* " if point is found.chosen_point else ""
        asked = "" if flat else f"{point.compression:g}"
        cells = [marks + point.name, asked, f"{point.bytes:,}", number(point.r2, 6)]
        cells += [number(point.auc_lost, 5), number(point.auc_bound, 5)] if found.labelled else []
        lines.append([*cells, f"{point.flops / 1e6:.3g}"])
    value = {**found.to_json(), "files": [] if plot is None else [str(plot)]}
    title = f"Bytes between hosts per sample and what they cost, {found.rows} of "
    output.result(value, table(title + found.data, columns, lines))
    if found.reason:
        output.remark(f"* {found.reason}")
    if found.labelled:
        output.remark(
            "at most: with 95 % confidence; more rows of --calibration narrow it down; rows that "
            "the flat model was trained on exaggerate what is lost"
        )
    else:
        output.remark("AUC lost is known with labelled rows: --calibration DATA")


def _memory_text(preview: Preview) -> str:
    total, free = sum(preview.memory_bytes.values()), preview.free_memory_bytes
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in preview.memory_bytes.items())
    beside = "" if free is None else f" of {human_bytes(free)} that are free"
    return f"about {human_bytes(total)}{beside} ({parts})"


def _module_text(module: TowerModuleSpec) -> str:
    """Describe a module before its size per tower is known."""
    return module.describe() + ("" if module.code is None else f"; {module.code.precision}")


def _features_text(model: DmtSpec) -> str:
    """Count the features of towers that send."""
    sent = sum(len(tower.features) for tower in model.sending_towers)
    all_of_them = len(model.flat.features)
    return f"{sent} features" if sent == all_of_them else f"{sent} of {all_of_them} features"


def _partition_text(partition: PartitionRecord) -> str:
    chosen = partition.strategy in ("coherent", "diverse")
    return partition.strategy + (f" by {partition.affinity}" if chosen else "")


def _remarks(bundle: Bundle) -> Iterator[str]:
    """Say what the user asked for in vain, and what is not as good as it might be."""
    from dmt_convert.placement import BATCH, advise_replication

    manifest = bundle.manifest
    steps = (manifest.config or {}).get("distill_steps")
    start = manifest.initialisation
    if steps and "distilled" not in start.method.split():
        why = next((note for note in start.notes if "distill" in note), start.notes[0])
        yield f"--distill-steps {steps} changed nothing: {why}"
    batch = (manifest.config or {}).get("batch") or BATCH
    advice = advise_replication(manifest.model, bundle.plan.cluster, batch=batch)
    if advice is not None:
        yield advice
    if manifest.model.compression < 1:
        yield (
            f"towers emit more than they hold (compression {manifest.model.compression:.2f}): "
            "choose smaller --c, --p or --dim"
        )


def _show_bundle(output: Output, source: Path, bundle: Bundle) -> None:
    from dmt_convert.conversion import describe_weakness
    from dmt_convert.documents import to_json
    from dmt_convert.model import describe_modules
    from dmt_convert.placement import describe_replication

    manifest, quality = bundle.manifest, bundle.quality
    model, held = manifest.model, describe_replication(bundle.plan)
    weakness = describe_weakness(quality, manifest.frontier)
    if weakness is not None:
        output.remark(f"warning: {weakness}\n")
    value = {
        "warning": weakness,
        "bundle": str(bundle.path),
        "report": str(bundle.path / "report.html"),
        "towers": [list(tower.features) for tower in model.towers],
        "partition": {
            "strategy": manifest.partition.strategy,
            "affinity": manifest.partition.affinity,
        },
        "on_every_rank": [tower.everywhere for tower in model.towers],
        "tower_module": to_json(model.sending_towers[0].module),
        "tower_dims": [tower.module.dim for tower in model.towers],
        "tower_bytes": model.tower_bytes,
        "compression": model.compression,
        "initialisation": to_json(manifest.initialisation),
        "optimizer_state": to_json(manifest.optimizer_state),
        "quality": quality.to_json(),
        "facts": [asdict(fact) for fact in manifest.facts],
        "ignored_tensors": [asdict(tensor) for tensor in manifest.ignored_tensors],
    }
    rows = [
        ("bundle", str(bundle.path)),
        ("report", str(bundle.path / "report.html")),
        ("towers", f"{len(model.sending_towers)}, over {_features_text(model)}"),
        ("partition", _partition_text(manifest.partition)),
        *((("on every rank", held),) if held else ()),
        ("tower module", describe_modules(model)),
        (
            "compression",
            f"{model.compression:.2f} ({sum(model.tower_bytes):,} bytes per sample cross hosts)",
        ),
        ("initialised", manifest.initialisation.method),
        ("optimizer state", f"accumulators of {len(bundle.accumulators)} tables"),
    ]
    output.result(value, grid(rows), _quality_table(quality))
    chosen = manifest.frontier.reason if manifest.frontier is not None else ""
    said = [chosen] if chosen else []
    for note in (*said, *manifest.optimizer_state.notes, *_remarks(bundle)):
        output.remark(f"note: {note}")
    assumed = [f"{f.subject} = {f.value}" for f in manifest.facts if f.source == "assumed"]
    if assumed:
        output.remark("assumed: " + "; ".join(assumed) + "\n(correct it with --model-config)")
    _suggest(output, source, bundle)


def _quality_table(quality: Quality) -> RenderableType:
    columns = ["model", "R^2>", "max |diff|>", "rank corr.>"]
    columns += ["AUC>", "log loss>", "NE>"] if quality.labelled else []
    lines = []
    for row in quality.rows:
        cells = [row.name, number(row.r2), number(row.max_abs_diff), number(row.rank_correlation)]
        if quality.labelled:
            cells += [number(row.auc), number(row.log_loss), number(row.ne)]
        lines.append(cells)
    title = f"\nLogits against the flat model, {quality.count} held-out rows of {quality.data}"
    return table(title, columns, lines)


def _suggest(output: Output, source: Path, bundle: Bundle) -> None:
    """Say what to do next."""
    from dmt_convert.adapter import model_option

    model = bundle.manifest.model
    option = model_option(model.flat)
    place = shlex.quote(str(bundle.path))
    output.remark(
        f"next: dmt evaluate {place} --data DATA{option}\n"
        f"      dmt finetune {place} --data DATA{option}\n"
        f"      dmt export {place} --format onnx --out DIR{option}"
    )
    if not model.is_passthrough:
        again = f"dmt convert {shlex.quote(str(source))} --towers {len(model.sending_towers)}"
        output.remark(
            f"fewer bytes, and what they cost: {again} --frontier{option}\n"
            f"exact model: {again} --tower-module passthrough{option}"
        )
