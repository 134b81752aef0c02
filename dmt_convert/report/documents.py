"""What a person finds in a bundle: `report.html` and `partition.svg`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from dmt_convert.architectures import FlatModelInfo
from dmt_convert.bundle import Manifest
from dmt_convert.partition import Partition, figure_svg
from dmt_convert.plan import TowerPlan
from dmt_convert.report.report_data import ReportData
from dmt_convert.report.report_page import render_report
from dmt_convert.scoring import Quality

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
    data = ReportData(
        title=info.checkpoint.source.name,
        tool_version=manifest.tool_version,
        source=manifest.source,
        facts=info.facts,
        spec=manifest.model,
        partition=partition,
        plan=plan,
        initialisation_method=str(manifest.initialisation["method"]),
        initialisation_notes=tuple(manifest.initialisation["notes"]),
        sample_description=str(manifest.initialisation["sample"]),
        quality=quality.rows,
        quality_data=f"{quality.count} held-out rows of: {quality.data}",
        labelled_data=quality.data if quality.labelled else None,
        weight_files=tuple((name, entry["bytes"]) for name, entry in manifest.weights.items()),
        commands=_commands(info, manifest, out),
    )
    return {
        REPORT_NAME: render_report(data),
        FIGURE_NAME: figure_svg(info.spec, partition),
    }


def _commands(info: FlatModelInfo, manifest: Manifest, out: Path) -> tuple[str, ...]:
    source, bundle = shlex.quote(info.checkpoint.source.name), shlex.quote(out.name)
    commands = [
        f"dmt verify {source} {bundle}",
        f"dmt evaluate {bundle} --data DATA",
        f"dmt plan {bundle} --hosts {len(manifest.model.towers)} --ranks-per-host 8",
    ]
    if not manifest.model.is_passthrough:
        commands.append(
            f"dmt convert {source} --towers {len(manifest.model.towers)} "
            f"--tower-module passthrough --out {bundle}-exact"
        )
    return tuple(commands)
