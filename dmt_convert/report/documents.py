"""What a bundle says of itself: the manifest for machines, report and figure for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmt_convert.adapter import model_option
from dmt_convert.bundle import Manifest
from dmt_convert.conversion import Sample
from dmt_convert.conversion.partition import Partition, figure_svg, measure_loads
from dmt_convert.documents import (
    Initialisation,
    PartitionRecord,
    Quality,
    Source,
    SourceFile,
    TowerLoadRecord,
    to_json,
)
from dmt_convert.families import FlatModelInfo
from dmt_convert.placement import TowerPlan
from dmt_convert.report.report_data import ReportData
from dmt_convert.report.report_page import render_report

if TYPE_CHECKING:
    from dmt_convert.conversion import StartedModel

REPORT_NAME = "report.html"
FIGURE_NAME = "partition.svg"


def describe_conversion(
    manifest: Manifest,
    info: FlatModelInfo,
    partition: Partition,
    plan: TowerPlan,
    quality: Quality,
    out: Path,
) -> Mapping[str, str]:
    """Return the text of every document of a bundle, by file name.

    Args:
        manifest: The bundle's manifest, digests included.
        info: The flat model.
        partition: The towers.
        plan: Where they go.
        quality: How well the converted model agrees.
        out: Where the bundle goes, for the commands to copy.
    """
    measured_on = f"{quality.count} held-out rows of: {quality.data}"
    figure = figure_svg(info.spec, partition)
    data = ReportData(
        title=info.checkpoint.source.name,
        tool_version=manifest.tool.version,
        source=to_json(manifest.source),
        facts=info.facts,
        spec=manifest.model,
        partition=partition,
        plan=plan,
        initialisation_method=manifest.initialisation.method,
        initialisation_notes=manifest.initialisation.notes,
        sample_description=manifest.initialisation.sample,
        quality=quality.rows,
        quality_data=measured_on,
        labelled_data=measured_on if quality.labelled else None,
        weight_files=tuple((name, entry.bytes) for name, entry in manifest.weights.items()),
        commands=_commands(info, manifest, out),
        figure=figure,
    )
    return {REPORT_NAME: render_report(data), FIGURE_NAME: figure}


def describe_bundle(
    manifest: Manifest, plan: TowerPlan, out: Path, *, figure: str | None = None
) -> Mapping[str, str]:
    """Return the text of every document of a bundle that was made of another bundle.

    Args:
        manifest: The bundle's manifest, digests included.
        plan: Where the towers go.
        out: Where the bundle goes, for the commands to copy.
        figure: The partition as an `<svg>` element; drawn anew without affinities where there
            is none.
    """
    partition = _read_partition(manifest)
    flat = manifest.model.flat
    if figure is None:
        figure = figure_svg(flat, partition)
    quality, initialisation = manifest.quality, manifest.initialisation
    bundle, option = shlex.quote(out.name), model_option(flat)
    data = ReportData(
        title=manifest.source.name or out.name,
        tool_version=manifest.tool.version,
        source=to_json(manifest.source),
        facts=manifest.facts,
        spec=manifest.model,
        partition=partition,
        plan=plan,
        initialisation_method=initialisation.method,
        initialisation_notes=initialisation.notes,
        sample_description=initialisation.sample,
        quality=quality.rows,
        quality_data=f"{quality.count} held-out rows of: {quality.data or '-'}",
        labelled_data=quality.data if quality.labelled else None,
        weight_files=tuple((name, entry.bytes) for name, entry in manifest.weights.items()),
        commands=(
            f"dmt evaluate {bundle} --data DATA{option}",
            f"dmt score {bundle} --data DATA --out scores.npz{option}",
            f"dmt plan {bundle} --hosts {len(manifest.model.towers)} --ranks-per-host 8",
        ),
        finetune=None if initialisation.finetune is None else to_json(initialisation.finetune),
        figure=figure,
    )
    return {REPORT_NAME: render_report(data), FIGURE_NAME: figure}


def _read_partition(manifest: Manifest) -> Partition:
    """What the manifest says of the towers; affinities of pairs are not in it."""
    said, assignment = manifest.partition, manifest.model.assignment
    loads = measure_loads(manifest.model.flat, assignment)
    lookups = [load.lookups for load in said.loads]
    if len(lookups) == len(loads):
        loads = tuple(
            load if count is None else replace(load, lookups=count)
            for load, count in zip(loads, lookups, strict=True)
        )
    return Partition(
        assignment=assignment,
        strategy=said.strategy,
        affinity_kind=said.affinity,
        affinity=None,
        loads=loads,
        within_affinity=said.within_affinity,
        between_affinity=said.between_affinity,
    )


def _commands(info: FlatModelInfo, manifest: Manifest, out: Path) -> tuple[str, ...]:
    source, bundle = shlex.quote(info.checkpoint.source.name), shlex.quote(out.name)
    option = model_option(info.spec)
    commands = [
        f"dmt verify {source} {bundle}{option}",
        f"dmt evaluate {bundle} --data DATA{option}",
        f"dmt plan {bundle} --hosts {len(manifest.model.towers)} --ranks-per-host 8",
    ]
    if not manifest.model.is_passthrough:
        commands.append(
            f"dmt convert {source} --towers {len(manifest.model.towers)} "
            f"--tower-module passthrough --out {bundle}-exact{option}"
        )
    return tuple(commands)


def describe_manifest(
    info: FlatModelInfo,
    partition: Partition,
    started: StartedModel,
    sample: Sample,
) -> Manifest:
    """Say all that `dmt.json` says, but for the weights."""
    return Manifest(
        model=started.spec,
        source=describe_source(info),
        facts=info.facts,
        partition=describe_partition(partition),
        initialisation=Initialisation(
            method=started.method, sample=sample.description, notes=tuple(started.notes)
        ),
        quality=started.quality,
    )


def describe_source(info: FlatModelInfo) -> Source:
    """Say where a bundle comes from (no absolute paths)."""
    checkpoint = info.checkpoint
    return Source(
        format=checkpoint.format,
        name=checkpoint.source.name,
        files=tuple(
            SourceFile(name=path.name, bytes=path.stat().st_size) for path in checkpoint.files
        ),
        bytes=checkpoint.nbytes,
    )


def describe_partition(partition: Partition) -> PartitionRecord:
    """Say how the towers came about, for the manifest."""
    return PartitionRecord(
        strategy=partition.strategy,
        affinity=partition.affinity_kind,
        within_affinity=partition.within_affinity,
        between_affinity=partition.between_affinity,
        loads=tuple(
            TowerLoadRecord(
                features=load.features, table_bytes=load.table_bytes, lookups=load.lookups
            )
            for load in partition.loads
        ),
    )
