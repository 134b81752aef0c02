"""Models and machines to predict, made of numbers."""

from __future__ import annotations

from typing import Any

from dmt_convert.placement import Cluster
from dmt_convert.placement.predict import Assumptions, Machine, Network, find_gpu
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def make_flat(
    features: int = 32, dim: int = 128, *, kind: str = "dot", rows: int = 10_000
) -> ModelSpec:
    """A flat model with as many tables as features, and the MLPs of MLPerf's DLRM."""
    if kind == "projection":
        branch = MlpSpec(widths=((features + 1) * dim, 64, 4 * dim), final_relu=True)
        interaction = InteractionSpec(kind="projection", branch1=branch, branch2=branch)
    elif kind == "dcn":
        interaction = InteractionSpec(kind="dcn", cross_layers=3, cross_rank=64)
    else:
        interaction = InteractionSpec(kind=kind)  # type: ignore[arg-type]
    width = interaction.output_width([dim] * (features + 1))
    return ModelSpec(
        family="test",
        tables=tuple(TableSpec(name=f"t{i}", rows=rows, dim=dim) for i in range(features)),
        features=tuple(FeatureSpec(name=f"f{i}", table=f"t{i}") for i in range(features)),
        dense_arch=MlpSpec(widths=(13, 512, 256, dim), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, 1024, 1024, 512, 256, 1), final_relu=False),
    )


def make_machine(
    gpu: str = "h100",
    hosts: int = 8,
    ranks: int = 8,
    *,
    batch: int = 4096,
    comm_dtype: Any = "fp32",
    intra_gbps: float | None = None,
    inter_gbps: float | None = None,
    **assumptions: float,
) -> Machine:
    """A cluster of one preset, with its own links where others are given."""
    preset = find_gpu(gpu)
    cluster = Cluster(
        hosts=hosts,
        ranks_per_host=ranks,
        hbm_bytes=preset.hbm_bytes,
        intra_gbps=intra_gbps or preset.intra_gbps,
        inter_gbps=inter_gbps or preset.inter_gbps,
    )
    network = Network(cluster=cluster, assumptions=Assumptions(**assumptions))
    return Machine(gpu=preset, network=network, batch=batch, comm_dtype=comm_dtype)
