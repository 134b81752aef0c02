"""Clusters check themselves."""

from __future__ import annotations

import math

import pytest

from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.placement import GIB, HBM_RESERVE, Cluster, default_cluster, plan_towers
from support.specs import spec_of_towers


def test_the_default_cluster_has_a_host_per_tower() -> None:
    cluster = default_cluster(16)
    assert (cluster.hosts, cluster.ranks_per_host, cluster.hbm_bytes) == (16, 8, 80 * GIB)
    assert cluster.world_size == 128
    assert cluster.usable_bytes == int(80 * GIB * (1 - HBM_RESERVE))
    assert [cluster.host_of(rank) for rank in (0, 7, 8, 127)] == [0, 0, 1, 15]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hosts", 0),
        ("hosts", 2.0),
        ("hosts", True),
        ("ranks_per_host", -1),
        ("hbm_bytes", 0),
        ("intra_gbps", 0.0),
        ("inter_gbps", math.inf),
        ("inter_gbps", math.nan),
    ],
)
def test_a_cluster_refuses_impossible_numbers(name: str, value: float) -> None:
    numbers = {"hosts": 2, "ranks_per_host": 4} | {name: value}
    with pytest.raises(ConfigError, match=f"{name} is") as error:
        Cluster(**numbers)  # type: ignore[arg-type]
    assert "--hosts" in error.value.hint


def test_a_cluster_without_memory_is_refused_with_the_numbers() -> None:
    spec, assignment = spec_of_towers([[(8, 4)], [(8, 4)]])
    cluster = Cluster(hosts=2, ranks_per_host=2, hbm_bytes=1)
    with pytest.raises(PlanError, match="cannot hold"):
        plan_towers(spec, assignment, cluster, tower_bytes=[16, 16])
