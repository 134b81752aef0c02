"""Reports on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from dmt_convert.conversion import QualityRow
from dmt_convert.conversion.partition import Partition, PartitionConfig, partition_features
from dmt_convert.families import Fact
from dmt_convert.model import DmtSpec, TowerSpec, module_spec
from dmt_convert.placement import Cluster, plan_towers
from dmt_convert.report import ReportData
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

DataMaker = Callable[..., ReportData]

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


def build_spec(count: int, *, dim: int = 8, names: Sequence[str] | None = None) -> ModelSpec:
    """A dot model of `count` features, each with a table of its own size."""
    names = names or [f"f{i}" for i in range(count)]
    pairs = (count + 1) * count // 2
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tuple(
            TableSpec(name=f"t{i}", rows=100 + 7919 * (i * i % 31) * 37, dim=dim)
            for i in range(count)
        ),
        features=tuple(FeatureSpec(name=names[i], table=f"t{i}") for i in range(count)),
        dense_arch=MlpSpec(widths=(13, 16, dim), final_relu=True),
        interaction=InteractionSpec(kind="dot"),
        over_arch=MlpSpec(widths=(dim + pairs, 16, 1), final_relu=False),
    )


def planted_affinity(count: int, blocks: int) -> np.ndarray:
    """Affinity that is high among every `blocks`-th feature."""
    rng = np.random.default_rng(0)
    noise = rng.random((count, count)) * 0.3
    block = np.arange(count) % blocks
    matrix = (noise + noise.T) / 2 + 0.5 * (block[:, None] == block[None, :])
    np.fill_diagonal(matrix, 1)
    return matrix.astype(np.float32)


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
    flat = build_spec(features, dim=dim, names=names)
    partition = partition_features(
        flat,
        PartitionConfig(num_towers=towers, strategy=strategy),
        planted_affinity(features, towers) if affinity else None,
    )
    spec = to_dmt(flat, partition, module)
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


def to_dmt(flat: ModelSpec, partition: Partition, module: Any) -> DmtSpec:
    towers = partition.assignment.towers
    chosen = module_spec(flat, module, num_towers=len(towers))
    return DmtSpec(
        flat=flat,
        towers=tuple(TowerSpec(features=names, module=chosen) for names in towers),
    )


@pytest.fixture(scope="session")
def make_data() -> DataMaker:
    return build_data
