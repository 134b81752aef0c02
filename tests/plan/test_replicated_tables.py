"""Tables on every rank in plans: memory of all, gradients once a step, nothing per sample."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dmt_convert.errors import PlanError
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec
from dmt_convert.placement import Cluster, Shard, TowerPlan, check_plan, plan_model
from dmt_convert.placement.predict import Assumptions, Machine, Network, find_gpu, predict_bundle
from dmt_convert.placement.predict.cost_model import as_passthrough, planned_load, step_time
from dmt_convert.placement.predict.prediction import predict_scaling
from support.specs import click_spec

ROWS = (400, 300, 20, 10)
CLUSTER = Cluster(hosts=2, ranks_per_host=2, hbm_bytes=10**6)


def spec_with(everywhere: int) -> DmtSpec:
    """Two passthrough towers, and the last features on every rank."""
    flat = click_spec(rows=ROWS)
    names = flat.feature_names
    rest = names[: len(names) - everywhere]
    module = TowerModuleSpec(kind="passthrough")
    towers = [rest[::2], rest[1::2]]
    return converted_spec(
        flat, towers, module, everywhere=[names[len(rest) :]] if everywhere else []
    )


@pytest.fixture
def plan() -> TowerPlan:
    return plan_model(spec_with(2), CLUSTER)


def test_every_rank_holds_table_gradient_and_sums(plan: TowerPlan) -> None:
    spec = spec_with(2)
    dims = spec.flat.feature_dims
    held = sum(ROWS[i] * (2 * 4 * dims[i] + 4) for i in (2, 3))
    own = [ROWS[i] * (4 * dims[i] + 4) for i in (0, 1)]
    assert sorted(plan.bytes_per_rank) == sorted([own[0] + held, held, own[1] + held, held])
    assert plan.tower_hosts == ((0,), (1,), ()) and plan.tower_order == (0, 1)
    assert [table.sharding_type for table in plan.tables[2:]] == ["data_parallel"] * 2
    assert [(table.rows, table.cols) for table in plan.tables[2:]] == [(20, dims[2]), (10, dims[3])]
    # ids of a rank's own samples: a quarter of the two features
    assert sum(plan.lookups_per_rank) == 4 and min(plan.lookups_per_rank) == 0.5
    check_plan(plan, spec.flat, spec.assignment)


def test_gradients_travel_once_a_step_and_nothing_per_sample(plan: TowerPlan) -> None:
    traffic, dims = plan.traffic, spec_with(2).flat.feature_dims
    assert traffic.replicated_step_bytes == 2 * 4 * (20 * dims[2] + 10 * dims[3]) * 3 / 4
    assert traffic.dmt_cross_bytes == 4 * (dims[0] + dims[1]) / 2
    assert traffic.flat_cross_bytes == 4 * sum(dims) / 2
    assert traffic.peer_indices.cross_bytes == 8  # of the one feature of the other host
    without = plan_model(spec_with(0), CLUSTER).traffic
    assert without.replicated_step_bytes == 0
    assert without.flat_indices == traffic.flat_indices
    assert plan.estimate(1).dmt_seconds - 1 * 8e-9 * traffic.replicated_step_bytes / 2 / 200 > 0


def test_one_host_sends_no_gradients() -> None:
    module = TowerModuleSpec(kind="passthrough")
    flat = click_spec(rows=ROWS)
    spec = converted_spec(
        flat, [flat.feature_names[:2]], module, everywhere=[flat.feature_names[2:]]
    )
    plan = plan_model(spec, Cluster(hosts=1, ranks_per_host=2))
    assert plan.traffic.replicated_step_bytes == 0 and plan.tower_hosts == ((0,), ())


def test_a_plan_comes_back_as_it_was_written(plan: TowerPlan) -> None:
    document = json.loads(json.dumps(plan.to_json()))
    assert TowerPlan.from_json(document) == plan
    assert "replicated_step_bytes" not in plan_model(spec_with(0), CLUSTER).to_json()["traffic"]


def replace_last(plan: TowerPlan, **changes: Any) -> TowerPlan:
    return replace(plan, tables=(*plan.tables[:3], replace(plan.tables[3], **changes)))


def test_impossible_placements_are_refused(plan: TowerPlan) -> None:
    whole = plan.tables[3].shards[0]
    twice = (replace(whole, rank=0), replace(whole, rank=1))
    for changes, message in (
        ({"compute_kernel": "fused"}, "data_parallel with kernel 'fused'"),
        ({"shards": (replace(whole, rank=2),)}, "not as one whole table"),
        ({"shards": twice}, "do not tile"),
        ({"sharding_type": "table_column_wise", "compute_kernel": "fused"}, "its tower on hosts"),
        ({"tower": 0}, "its tower on hosts"),
    ):
        with pytest.raises(PlanError, match=message):
            replace_last(plan, **changes)
    with pytest.raises(PlanError, match="no towers on hosts"):
        replace(plan, tower_hosts=((), (), ()))


def test_other_bytes_than_the_tables_are_noticed(plan: TowerPlan) -> None:
    spec = spec_with(2)
    forged = replace(plan, bytes_per_rank=tuple(size - 8 for size in plan.bytes_per_rank))
    with pytest.raises(PlanError, match="the plan says"):
        check_plan(forged, spec.flat, spec.assignment)


def test_tables_on_every_rank_need_room() -> None:
    with pytest.raises(PlanError, match="tables on every rank take"):
        plan_model(spec_with(2), replace(CLUSTER, hbm_bytes=1_500))
    # 1,400 bytes on every rank leave too little for 14,400 bytes of towers on two ranks
    with pytest.raises(PlanError, match="for tables on every rank"):
        plan_model(spec_with(2), replace(CLUSTER, hbm_bytes=9_000), host_memory=False)


def test_the_prediction_counts_gradients_and_saved_exchanges() -> None:
    cluster = Cluster(hosts=4, ranks_per_host=2)
    machine = Machine(
        gpu=find_gpu("h100"), network=Network(cluster=cluster, assumptions=Assumptions()), batch=64
    )
    flat = click_spec(rows=(400, 300, 200_000, 10), dims=(64, 64, 64, 64))
    names, module = flat.feature_names, TowerModuleSpec(kind="passthrough")
    together = converted_spec(flat, [names[:2], names[2:]], module)
    local = converted_spec(flat, [names[:1], names[1:2]], module, everywhere=[names[2:]])
    steps = {}
    for name, spec in (("together", together), ("local", local)):
        plan = plan_model(spec, cluster)
        steps[name] = step_time(planned_load(spec, plan, 1.0, even_ranks=True), machine)
        assert planned_load(as_passthrough(spec), plan, 1.0).replicated_elements == (
            0 if name == "together" else 200_010 * 64
        )
    assert steps["local"].forward < steps["together"].forward
    assert steps["local"].lookup > steps["together"].lookup  # the whole table is moved
    cross = machine.network.all_reduce(200_010 * 64 * 4, 4)
    assert steps["local"].all_reduce > cross > 10 * steps["together"].all_reduce


def test_torchrec_gets_them_as_data_parallel(plan: TowerPlan) -> None:
    pytest.importorskip("torchrec", reason="turns plans into TorchRec's, which needs torchrec")
    from dmt_convert.placement.torchrec_plan import (
        build_tower_collection,
        check_sharding_plan,
        to_sharding_plan,
    )

    spec = spec_with(2)
    found = to_sharding_plan(plan, spec.flat, spec.assignment, module_path="towers", device="cpu")
    assert list(found.plan) == ["towers", "replicated"]
    names = [table.name for table in spec.flat.tables]
    assert list(found.plan["towers"]) == names[:2] and list(found.plan["replicated"]) == names[2:]
    local = found.plan["replicated"][names[2]]
    assert (local.sharding_type, local.compute_kernel) == ("data_parallel", "dense")
    assert local.ranks == [0, 1, 2, 3] and local.sharding_spec is None
    towers = build_tower_collection(spec.flat, spec.assignment, order=plan.tower_order)
    check_sharding_plan(found, towers, plan=plan, module_path="towers")


def test_a_shard_of_it_is_the_whole_table(plan: TowerPlan) -> None:
    assert plan.tables[3].shards == (
        Shard(rank=0, row_offset=0, col_offset=0, rows=10, cols=spec_with(2).flat.feature_dims[3]),
    )
    assert list(plan.ranks_of(2)) == [0, 1, 2, 3]


def test_scaling_counts_their_gradients() -> None:
    spec, cluster = spec_with(2), Cluster(hosts=2, ranks_per_host=8)
    machine = Machine(
        gpu=find_gpu("h100"), network=Network(cluster=cluster, assumptions=Assumptions()), batch=64
    )
    plan = plan_model(spec, cluster)
    with_sums = predict_bundle(spec, plan, machine, predict=False, scaling=True).scaling
    assert with_sums is not None
    without = predict_scaling(spec.flat, machine, compression=spec.compression)
    for some, none in zip(with_sums, without, strict=True):
        assert some.compression == none.compression
        ours, theirs = some.prediction.dmt.step, none.prediction.dmt.step
        assert ours.all_reduce > theirs.all_reduce and ours.lookup > theirs.lookup
        assert some.prediction.flat == none.prediction.flat
