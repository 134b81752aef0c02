"""Which plan a bundle is trained by on the ranks that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.cluster import sharding
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.cluster.sharding import check_memory, choose_plan, set_precisions
from dmt_convert.config import TrainingConfig
from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.placement import plan_towers, training_bytes
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


class Alone:
    """Ranks of which each says the same as this one."""

    def __init__(self, size: int) -> None:
        self._size = size

    def on_all(self, work: Any) -> list[Any]:
        return [work() for _ in range(self._size)]


def check(bundle: Bundle, kind: Any, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choose_plan(bundle, layout(1, 2), None)
    monkeypatch.setattr(sharding, "free_memory", lambda layout: free)
    check_memory(bundle, plan, kind, layout(1, 2), Alone(2))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_it_is_allocated(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of free memory, and with the state of the optimizer that is asked for."""
    model = bundle.manifest.model
    plan = choose_plan(bundle, layout(1, 2), None)
    sgd, adagrad = (max(training_bytes(plan, model, kind)) for kind in ("sgd", "adagrad"))
    assert adagrad == 2 * sgd
    check(bundle, "sgd", sgd, monkeypatch)
    check(bundle, "adagrad", adagrad, monkeypatch)
    with pytest.raises(PlanError, match="float32 tables and the state of adagrad") as no:
        check(bundle, "adagrad", adagrad - 1, monkeypatch)
    assert "nothing was allocated" in no.value.expected and "rank 0: " in no.value.details[0]


def test_ranks_that_would_place_towers_differently_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Alone, "on_all", lambda self, work: [("a plan", 10**9), ("another plan", 10**9)]
    )
    with pytest.raises(PlanError, match="place the towers differently"):
        check(bundle, "sgd", 10**9, monkeypatch)


def test_the_memory_of_gpus_and_the_optimizer_decide_on_the_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle's plan is of 80 GiB; a small GPU cannot hold its largest table whole."""
    small = max(bundle.plan.bytes_per_rank)  # a part of it is kept for all but tables
    monkeypatch.setattr(sharding, "_device_memory", lambda layout: small)
    plan = choose_plan(bundle, layout(2, 8), None)
    assert plan != bundle.plan and plan.cluster.hbm_bytes == small
    monkeypatch.setattr(sharding, "_device_memory", lambda layout: 2 * small)
    assert choose_plan(bundle, layout(2, 8), None, "adagrad").optimizer == "adagrad"
    monkeypatch.setattr(sharding, "_device_memory", lambda layout: 10**9)
    assert choose_plan(bundle, layout(2, 8), None) == bundle.plan


def test_precisions_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 on GPUs, unless it is said; nothing is changed on CPUs."""
    asked: list[str] = []
    monkeypatch.setattr(sharding.torch, "set_float32_matmul_precision", asked.append)
    on_gpus = replace(layout(1, 2), backend="nccl")
    set_precisions(TrainingConfig(), layout(1, 2))
    assert not asked
    set_precisions(TrainingConfig(dense_comm_dtype="bf16"), on_gpus)
    set_precisions(TrainingConfig(matmul_precision="highest"), on_gpus)
    assert asked == ["high", "highest"]
    with pytest.raises(ConfigError, match="averaged in bf16 over gloo"):
        set_precisions(TrainingConfig(dense_comm_dtype="bf16"), layout(1, 2))
