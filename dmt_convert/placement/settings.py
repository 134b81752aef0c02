"""The cluster and the machine that the settings of a command describe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dmt_convert.config import ClusterOptions, PlanConfig
from dmt_convert.errors import ConfigError
from dmt_convert.placement.cluster import GIB, Cluster
from dmt_convert.placement.predict import Assumptions, Machine, Network, find_gpu
from dmt_convert.placement.replication import BATCH


def make_cluster(config: ClusterOptions | PlanConfig, *, hosts: int = 1) -> Cluster:
    """Make the cluster that settings describe; what they leave out is the GPU's, or the default.

    Args:
        config: The settings.
        hosts: Number of hosts if the settings do not say.

    Raises:
        ConfigError: No cluster has these numbers, or the GPU is not known.
    """
    given: dict[str, Any] = {}
    if isinstance(config, PlanConfig):
        if config.gpu is not None:
            gpu = find_gpu(config.gpu)
            given = {n: getattr(gpu, n) for n in ("hbm_bytes", "intra_gbps", "inter_gbps")}
        speeds = {"intra_gbps": config.intra_gbps, "inter_gbps": config.inter_gbps}
        given |= {name: value for name, value in speeds.items() if value is not None}
    if config.hbm_gib is not None:
        given["hbm_bytes"] = max(1, int(config.hbm_gib * GIB))
    count, ranks = config.hosts or hosts, config.ranks_per_host or 8
    pod = config.hosts_per_pod if isinstance(config, PlanConfig) else 1
    if count % pod:
        raise ConfigError(
            f"{count} hosts in pods of {pod}",
            expected="whole pods",
            hint="--hosts counts hosts, --hosts-per-pod those that share one NVLink domain",
        )
    return Cluster(hosts=count // pod, ranks_per_host=ranks * pod, **given)


def make_machine(config: PlanConfig, cluster: Cluster) -> Machine:
    """Make what steps are predicted for.

    Raises:
        ConfigError: The GPU, or a constant of the cost model, is not known.
    """
    assumptions = Assumptions().override(config.assume)
    return Machine(
        gpu=replace(find_gpu(config.gpu or "h100"), matmul_precision=config.matmul_precision),
        network=Network(cluster=cluster, assumptions=assumptions),
        batch=config.batch or BATCH,
        comm_dtype=config.comm_dtype,
    )
