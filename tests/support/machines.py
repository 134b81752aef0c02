"""Clusters to predict the speed of, made of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmt_convert.placement import Cluster
from dmt_convert.placement.predict import Assumptions, Machine, Network, find_gpu
from dmt_convert.spec import MatmulPrecision


def make_machine(
    gpu: str = "h100",
    hosts: int = 8,
    ranks: int = 8,
    *,
    batch: int = 4096,
    comm_dtype: Any = "fp32",
    intra_gbps: float | None = None,
    inter_gbps: float | None = None,
    matmul_precision: MatmulPrecision = "high",
    **assumptions: float,
) -> Machine:
    """A cluster of one preset, with its own links where others are given."""
    preset = replace(find_gpu(gpu), matmul_precision=matmul_precision)
    cluster = Cluster(
        hosts=hosts,
        ranks_per_host=ranks,
        hbm_bytes=preset.hbm_bytes,
        intra_gbps=intra_gbps or preset.intra_gbps,
        inter_gbps=inter_gbps or preset.inter_gbps,
    )
    network = Network(cluster=cluster, assumptions=Assumptions(**assumptions))
    return Machine(gpu=preset, network=network, batch=batch, comm_dtype=comm_dtype)


def flops(rate: float) -> dict[MatmulPrecision, float]:
    """Peaks of a GPU that computes in every precision alike."""
    return {"highest": rate, "high": rate, "medium": rate}
