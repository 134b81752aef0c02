"""Which plan a bundle is trained by on the ranks that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.cluster.sharding import choose_plan
from dmt_convert.errors import PlanError
from dmt_convert.placement import plan_towers
from dmt_convert.placement.cluster import Cluster


def layout(hosts: int, ranks_per_host: int) -> RankLayout:
    return RankLayout(
        rank=0,
        world_size=hosts * ranks_per_host,
        local_rank=0,
        ranks_per_host=ranks_per_host,
        backend="gloo",
    )


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    """Two towers, planned for two hosts of eight ranks."""
    return open_bundle(bundle_path)


def test_the_plan_of_the_bundle_is_taken_where_it_fits(bundle: Bundle) -> None:
    found = (bundle.plan.cluster.hosts, bundle.plan.cluster.ranks_per_host)
    assert found == (2, 8)
    assert choose_plan(bundle, layout(2, 8), None) == bundle.plan


@pytest.mark.parametrize(
    ("hosts", "ranks", "hosts_per_tower"), [(1, 1, 1), (1, 4, 1), (2, 2, 1), (4, 2, 2)]
)
def test_a_plan_is_made_for_another_cluster(
    bundle: Bundle, hosts: int, ranks: int, hosts_per_tower: int
) -> None:
    plan = choose_plan(bundle, layout(hosts, ranks), None)
    assert (plan.cluster.hosts, plan.cluster.ranks_per_host) == (hosts, ranks)
    assert plan.cluster.hbm_bytes == bundle.plan.cluster.hbm_bytes
    assert plan.hosts_per_tower == hosts_per_tower
    assert len(plan.tower_hosts) == 2
    assert [table.table for table in plan.tables] == [t.table for t in bundle.plan.tables]


def test_the_plan_that_was_asked_for_is_taken(bundle: Bundle) -> None:
    model = bundle.manifest.model
    given = plan_towers(
        model.flat,
        model.assignment,
        Cluster(hosts=2, ranks_per_host=2, hbm_bytes=10**8),
        tower_bytes=model.tower_bytes,
    )
    assert choose_plan(bundle, layout(2, 2), given) is given


def test_a_plan_that_was_asked_for_and_does_not_fit_is_refused(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match="a plan for 2 hosts x 8 ranks, on 2 hosts x 2 ranks") as no:
        choose_plan(bundle, layout(2, 2), bundle.plan)
    assert "--hosts 2 --ranks-per-host 2" in str(no.value)
    with pytest.raises(PlanError, match="2 hosts x 8 ranks, on 1 host x 1 rank\n"):
        choose_plan(bundle, layout(1, 1), bundle.plan)


def test_towers_that_cannot_be_placed_are_refused(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match="2 towers on 3 hosts"):
        choose_plan(bundle, layout(3, 1), None)
