"""Reports on tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from dmt_convert.config import PartitionConfig
from dmt_convert.conversion.partition import Partition, partition_features
from dmt_convert.documents import QualityRow
from dmt_convert.families import Fact
from dmt_convert.model import DmtSpec, TowerSpec, module_spec
from dmt_convert.placement import Cluster, plan_towers
from dmt_convert.report import ReportData
from support.affinities import planted_affinity
from support.specs import build_spec

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


def build_data(
    features: int = 6,
    towers: int = 2,
    *,
    names: Sequence[str] | None = None,
    strategy: Any = "coherent",
    affinity: bool = True,
    module: Any = "auto",
    hosts: int | None = None,
    dim: int = 8,
    **changes: Any,
) -> ReportData:
    """A report; `changes` are fields of `ReportData`."""
    named = tuple(names) if names else features
    spec, partition = _partitioned(named, towers, strategy, affinity, module, dim)
    flat = spec.flat
    cluster = Cluster(hosts=hosts or towers, ranks_per_host=8)
    fields: dict[str, Any] = {
        "title": "ckpt.pt",
        "tool_version": "0.1.0",
        "source": {
            "format": "torch",
            "files": [{"name": "ckpt.pt", "bytes": 123_456_789}],
            "nbytes": 123_450_000,
            "digest": "sha256-tree:0011223344556677",
        },
        "facts": FACTS,
        "spec": spec,
        "partition": partition,
        "plan": plan_towers(flat, partition.assignment, cluster, tower_widths=spec.tower_widths),
        "initialisation_method": "closed form",
        "initialisation_notes": ("over_arch.0 refitted: R^2 of pre-activations 0.97 -> 0.998",),
        "sample_description": "4096 sampled inputs, table rows drawn uniformly",
        "quality": QUALITY,
        "quality_data": "1024 held-out rows of: sampled inputs",
        "labelled_data": None,
        "weight_files": (("weights/dense.safetensors", 12_345),),
        "commands": ("dmt verify ckpt.pt ckpt-dmt2", "dmt evaluate ckpt-dmt2 --data DATA"),
    }
    return ReportData(**{**fields, **changes})
