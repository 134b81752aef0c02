"""What tables take of memory in training, and where those go that are too large for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmt_convert.errors import PlanError
from dmt_convert.placement import TowerPlan, check_plan, describe_cached, plan_towers
from dmt_convert.placement.cluster import GIB, Cluster
from dmt_convert.placement.table_memory import CACHED_SHARE, cached_share, copy_bytes, shard_bytes
from dmt_convert.placement.torchrec_plan import to_sharding_plan
from dmt_convert.spec import (
    FeatureSpec,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
    TowerAssignment,
)

TOWERS = TowerAssignment(towers=(("f0",), ("f1",)))


def make_spec(rows: int, dim: int = 64, dtype: str = "fp32") -> ModelSpec:
    """Two tables, of a tower each; the first is large."""
    tables = (
        TableSpec(name="t0", rows=rows, dim=dim, dtype=dtype),  # type: ignore[arg-type]
        TableSpec(name="t1", rows=100, dim=dim, dtype=dtype),  # type: ignore[arg-type]
    )
    interaction = InteractionSpec(kind="cat")
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tables,
        features=(FeatureSpec(name="f0", table="t0"), FeatureSpec(name="f1", table="t1")),
        dense_arch=MlpSpec(widths=(4, dim), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(interaction.output_width((dim,) * 3), 1), final_relu=False),
    )


def make_plan(spec: ModelSpec, hbm: int, **options: object) -> TowerPlan:
    cluster = Cluster(hosts=2, ranks_per_host=1, hbm_bytes=hbm)
    return plan_towers(spec, TOWERS, cluster, tower_bytes=[8, 8], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "factor"), [("rowwise_adagrad", 1), ("sgd", 1), ("adagrad", 2), ("adam", 3)]
)
def test_state_of_the_optimizer_is_counted(optimizer: str, factor: int) -> None:
    rowwise = 4 * (optimizer == "rowwise_adagrad")
    plan = make_plan(make_spec(1000), GIB, optimizer=optimizer)
    assert plan.bytes_per_rank[0] == 1000 * (64 * 4 * factor + rowwise)
    assert TowerPlan.from_json(plan.to_json()) == plan
    assert plan.to_json()["optimizer"] == optimizer
    # the whole gradient as well
    assert copy_bytes(10, 3, optimizer=optimizer) == 10 * (3 * 4 * (factor + 1) + rowwise)  # type: ignore[arg-type]


def test_tables_are_trained_as_float32_whatever_they_are_stored_as() -> None:
    spec = make_spec(1000, dtype="fp16")
    plan = make_plan(spec, GIB)
    assert plan.bytes_per_rank[0] == 1000 * (64 * 4 + 4)
    with pytest.raises(PlanError, match="float32 tables and the state of adagrad") as refused:
        make_plan(make_spec(10**9, dtype="fp16"), GIB, optimizer="adagrad")
    assert "fp16" not in str(refused.value.hint)


def test_a_plan_of_an_earlier_version_is_one_of_its_model() -> None:
    """It counted tables in the type in which they are stored."""
    spec = make_spec(1000, dtype="fp16")
    plan = make_plan(spec, GIB)
    earlier = replace(plan, bytes_per_rank=(1000 * (64 * 2 + 4), 100 * (64 * 2 + 4)))
    check_plan(earlier, spec, TOWERS)
    with pytest.raises(PlanError, match="does not fit"):
        check_plan(replace(earlier, bytes_per_rank=(7, 7)), spec, TOWERS)


LARGE = make_spec(10_000)


def test_a_table_too_large_for_its_rank_lies_in_host_memory() -> None:
    whole = shard_bytes(10_000, 64)
    assert make_plan(LARGE, 2 * whole).tables[0].compute_kernel == "fused"
    plan = make_plan(LARGE, whole)
    large, small = plan.tables
    assert (large.compute_kernel, large.cached) == ("fused_uvm_caching", CACHED_SHARE)
    assert (small.compute_kernel, small.cached) == ("fused", None)
    # a fifth of the rows with tags, and a map of all of them
    assert plan.bytes_per_rank[0] == 2001 * (64 * 4 + 16) + 10_000 * 4
    assert "1 of 2 tables" in str(describe_cached(plan))
    assert describe_cached(make_plan(LARGE, 2 * whole)) is None
    assert TowerPlan.from_json(plan.to_json()) == plan
    check_plan(plan, LARGE, TOWERS)


def test_what_is_kept_of_it_follows_from_its_frequencies() -> None:
    assert cached_share([0, 0, 0]) == CACHED_SHARE
    assert cached_share(np.ones(1000, dtype=np.int64)) == pytest.approx(0.95, abs=0.002)
    skewed = 10**6 // (1 + np.arange(1000)) ** 2
    assert cached_share(skewed) < 0.02
    share = cached_share(skewed)
    plan = make_plan(LARGE, shard_bytes(10_000, 64), cached_shares={"t0": share})
    assert plan.tables[0].cached == share


def test_torchrec_is_told_of_it() -> None:
    pytest.importorskip("torchrec", reason="builds TorchRec's plan")
    plan = make_plan(LARGE, shard_bytes(10_000, 64), cached_shares={"t0": 0.125})
    made = to_sharding_plan(plan, LARGE, TOWERS, device="cpu").plan[""]
    assert made["t0"].compute_kernel == "fused_uvm_caching"
    assert made["t0"].cache_params.load_factor == 0.125
    assert made["t1"].cache_params is None


def test_what_is_kept_must_fit_too() -> None:
    with pytest.raises(PlanError, match="nor the rows in use"):
        make_plan(LARGE, 100_000)
    plan = make_plan(LARGE, shard_bytes(10_000, 64))
    whole = replace(plan.tables[0], cached=None)
    with pytest.raises(PlanError, match="impossible plan"):
        replace(plan, tables=(whole, plan.tables[1]))
