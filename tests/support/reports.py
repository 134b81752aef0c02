"""Reports on tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from dmt_convert.bundle import Manifest
from dmt_convert.config import PartitionConfig
from dmt_convert.conversion import describe_partition
from dmt_convert.conversion.partition import Partition, partition_features
from dmt_convert.documents import (
    Initialisation,
    Quality,
    QualityRow,
    Source,
    SourceFile,
    Tool,
    WeightsFile,
)
from dmt_convert.families import Fact
from dmt_convert.model import DmtSpec, TowerSpec, module_spec
from dmt_convert.placement import Cluster, plan_towers
from dmt_convert.report.figures import figure_svg
from dmt_convert.report.view import ReportView
from support.affinities import planted_affinity
from support.specs import build_spec

NO_FIGURE = '<svg viewBox="0 0 1 1"></svg>'
"""Drawing takes a second."""

FACTS = (
    Fact(subject="embedding dim", value="8", source="read", reason="metadata of the checkpoint"),
    Fact(subject="interaction", value="dot", source="inferred", reason="widths of over_arch"),
    Fact(subject="pooling", value="sum", source="assumed", reason="the trainer's default"),
    Fact(subject="feature names", value="f0 ...", source="given", reason="--model-config"),
)

QUALITY = (
    QualityRow(name="flat", r2=1.0, max_abs_diff=0.0, rank_correlation=1.0),
    QualityRow(name="closed form", r2=0.99873, max_abs_diff=0.2113, rank_correlation=0.9991),
    QualityRow(name="random initialisation", r2=-3.21, max_abs_diff=9.73, rank_correlation=0.0321),
)


@cache
def _partitioned(
    features: int | tuple[str, ...],
    towers: int,
    strategy: Any,
    affinity: bool,
    module: Any,
    dim: int,
) -> tuple[DmtSpec, Partition]:
    count = features if isinstance(features, int) else len(features)
    flat = build_spec(
        features,
        kind="dot",
        dims=dim,
        rows=[100 + 7919 * (i * i % 31) * 37 for i in range(count)],
        dense=(13, 16),
        hidden=(16,),
        family="torchrec-dlrm",
    )
    partition = partition_features(
        flat,
        PartitionConfig(towers=towers, partition=strategy),
        planted_affinity(count, towers) if affinity else None,
    )
    chosen = module_spec(flat, module, num_towers=towers)
    members = partition.assignment.towers
    towers_of = tuple(TowerSpec(features=names, module=chosen) for names in members)
    return DmtSpec(flat=flat, towers=towers_of), partition


def build_view(
    features: int = 6,
    towers: int = 2,
    *,
    names: Sequence[str] | None = None,
    strategy: Any = "coherent",
    affinity: bool = True,
    module: Any = "auto",
    hosts: int | None = None,
    dim: int = 8,
    figure: str | None = NO_FIGURE,
    rows: tuple[QualityRow, ...] = QUALITY,
    labelled: str | None = None,
    **changes: Any,
) -> ReportView:
    """What a report says; `changes` are fields of the manifest.

    Args:
        figure: None draws it.
        rows: The quality table.
        labelled: Description of the held-out rows, if they have labels.
    """
    named = tuple(names) if names else features
    spec, partition = _partitioned(named, towers, strategy, affinity, module, dim)
    cluster = Cluster(hosts=hosts or towers, ranks_per_host=8)
    record = describe_partition(partition)
    fields: dict[str, Any] = {
        "tool": Tool(version="0.1.0"),
        "source": Source(
            format="torch",
            name="ckpt.pt",
            files=(SourceFile(name="ckpt.pt", bytes=123_456_789),),
            bytes=123_450_000,
            digest="sha256-tree:0011223344556677",
        ),
        "facts": FACTS,
        "model": spec,
        "partition": record,
        "initialisation": Initialisation(
            method="closed form",
            sample="4096 sampled inputs, table rows drawn uniformly",
            notes=("over_arch.0 refitted: R^2 of pre-activations 0.97 -> 0.998",),
        ),
        "quality": Quality(
            rows=rows,
            data=labelled or "sampled inputs",
            count=1024,
            labelled=labelled is not None,
        ),
        "weights": {"weights/dense.safetensors": WeightsFile(bytes=12_345, digests={})},
    }
    return ReportView(
        manifest=Manifest(**{**fields, **changes}),
        plan=plan_towers(spec.flat, partition.assignment, cluster, tower_bytes=spec.tower_bytes),
        folder=f"ckpt-dmt{towers}",
        figure=figure
        or figure_svg(spec.flat, partition.assignment.towers, record, partition.affinity),
        shows_affinity=affinity,
    )
