"""Predictions of plans, scaling in the paper's shape, and suggestions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.model import DmtSpec, TowerCode
from dmt_convert.placement import TowerPlan, plan_model
from dmt_convert.placement.predict import (
    Machine,
    predict_bundle,
    predict_placement,
    predict_plan,
    predict_scaling,
    suggest,
)
from dmt_convert.placement.predict.cost_model import (
    as_flat,
    as_passthrough,
    crossing_bytes,
    even_load,
    planned_load,
    step_time,
)
from dmt_convert.placement.predict.prediction import (
    TOLERANCE,
    deal_tables,
    dealt_model,
    predict_copies,
    tower_counts,
)
from support.machines import flops, make_machine
from support.specs import mlperf_spec

WIDE = mlperf_spec(512, 64, kind="projection")
NO_LATENCY = {
    "launch_us": 0.0,
    "cross_message_us": 0.0,
    "intra_message_us": 0.0,
    "cross_hop_us": 0.0,
    "intra_hop_us": 0.0,
    "scale_loss": 0.0,
    "step_overhead_us": 0.0,
}


def planned(machine: Machine, towers: int, ratio: float) -> tuple[DmtSpec, TowerPlan]:
    flat = mlperf_spec(32, 128)
    model = dealt_model(flat, towers, ratio)
    assert model is not None
    cluster = machine.network.cluster
    return model, plan_model(model, cluster)


def test_even_and_planned_loads_agree_where_towers_are_even() -> None:
    """32 equal tables on 8 hosts of 4 ranks: one on each rank, whoever counts."""
    machine = make_machine("h100", 8, 4)
    model, plan = planned(machine, 8, 4)
    cluster = machine.network.cluster
    exact = planned_load(model, plan, 3.0)
    assert exact == planned_load(model, plan, 3.0, even_ranks=True)
    even = even_load(model, cluster, 3.0)
    assert exact.lookup == even.lookup
    assert exact.module == even.module
    # only the flat exchanges of the plan are counted by another formula
    for name in ("peer_indices", "tower_indices", "tower_embeddings", "tower_outputs"):
        ours, theirs = getattr(even.traffic, name), getattr(exact.traffic, name)
        assert ours.cross_bytes == pytest.approx(theirs.cross_bytes)
        assert ours.intra_bytes == pytest.approx(theirs.intra_bytes)
    flat = even_load(as_flat(model.flat), cluster, 3.0).traffic
    assert flat.tower_embeddings.cross_bytes == exact.traffic.flat_embeddings.cross_bytes
    assert flat.tower_indices.intra_bytes == pytest.approx(exact.traffic.flat_indices.intra_bytes)


@given(towers=st.sampled_from([1, 2, 4, 8, 16, 24]), ratio=st.sampled_from([1.0, 2.0, 8.0]))
def test_a_plan_as_placed_is_never_faster_than_an_even_one(towers: int, ratio: float) -> None:
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, towers, ratio)
    placed = predict_placement(model, plan, machine)
    prediction = predict_plan(model, plan, machine)
    assert placed.busiest_rank >= 1 - 1e-12
    assert placed.step.total >= prediction.dmt.step.total * (1 - 1e-12)


def test_rows_of_a_prediction() -> None:
    machine = make_machine("h100", 8, 8, comm_dtype="bf16")
    model, plan = planned(machine, 8, 4)
    prediction = predict_plan(model, plan, machine)
    assert [step.variant for step in prediction.steps] == ["flat", "sptt", "dmt"]
    assert prediction.flat.speedup == 1
    assert prediction.dmt.speedup > prediction.sptt.speedup
    assert prediction.dmt.speedup == pytest.approx(
        prediction.flat.step.total / prediction.dmt.step.total
    )
    value = prediction.dmt.to_json()
    assert value["step_ms"] == prediction.dmt.step.total * 1e3
    assert value["exposed_ms"] <= value["communication_ms"]


def test_a_report_holds_what_was_asked_for() -> None:
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, 8, 4)
    bare = predict_bundle(model, plan, machine, predict=False).to_json()
    assert bare["modelled"] is True and bare["assumptions"]["prefetch"] == 1
    both = predict_bundle(model, plan, machine, 2.0, scaling=True)
    value = both.to_json()
    assert set(value) - set(bare) == {
        "rows", "as_placed", "suggestion", "candidates", "towers_that_do_not_fit", "scaling",
    }  # fmt: skip
    assert both.prediction == predict_plan(model, plan, machine, ids_per_bag=2.0)
    assert [row["variant"] for row in value["rows"]] == ["flat", "flat2d", "sptt", "dmt"]
    only = predict_bundle(model, plan, machine, predict=False, scaling=True).to_json()
    assert set(only) - set(bare) == {"scaling"}


def test_a_passthrough_bundle_is_sptt() -> None:
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, 8, 1)
    assert model.is_passthrough
    prediction = predict_plan(model, plan, machine)
    assert prediction.dmt.step == prediction.sptt.step


def test_pooling_adds_ids_and_lookups_but_no_embeddings() -> None:
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, 8, 4)
    one = predict_plan(model, plan, machine).dmt.step
    many = predict_plan(model, plan, machine, ids_per_bag=20.0).dmt.step
    assert many.indices > one.indices and many.lookup > 5 * one.lookup
    assert many.forward == one.forward and many.dense == one.dense


@pytest.mark.parametrize("ids", [0.0, -1.0, float("nan"), float("inf")])
def test_no_ids_are_refused(ids: float) -> None:
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, 8, 4)
    for call in (
        lambda: predict_plan(model, plan, machine, ids_per_bag=ids),
        lambda: suggest(model.flat, machine, ids_per_bag=ids),
        lambda: predict_scaling(model.flat, machine, compression=4, ids_per_bag=ids),
    ):
        with pytest.raises(ConfigError, match="--ids-per-bag"):
            call()


def test_more_than_16384_ranks_are_refused() -> None:
    machine = make_machine("h100", 4096, 8)
    with pytest.raises(ConfigError, match="32768 ranks"):
        suggest(mlperf_spec(), machine)
    with pytest.raises(ConfigError, match="20000 ranks per host"):
        predict_scaling(mlperf_spec(), make_machine("h100", 1, 20000), compression=2)


def speedups(gpu: str, compression: float = 8, **settings: float) -> dict[int, float]:
    machine = make_machine(gpu, 2, 8, comm_dtype="bf16", **settings)
    points = predict_scaling(WIDE, machine, compression=compression)
    return {point.ranks: point.prediction.dmt.speedup for point in points}


@pytest.mark.parametrize("gpu", ["v100", "a100", "h100"])
def test_speedup_grows_with_hosts_and_flattens(gpu: str) -> None:
    """The paper's shape, from 16 to 512 GPUs."""
    found = speedups(gpu)
    gains = [found[size] for size in (16, 32, 64, 128, 256)]
    assert gains == sorted(gains)
    assert gains[1] - gains[0] > 2 * (gains[4] - gains[3])
    assert found[64] > 1.5


def test_without_latency_speedup_saturates_at_amdahls_bound() -> None:
    """1 / (1 - s + s / CR), s the exposed share of flat's embedding exchange between hosts."""
    machine = make_machine("h100", 2, 8, intra_gbps=1e9, **NO_LATENCY)
    quick = replace(machine, gpu=replace(machine.gpu, hbm_bytes_per_s=1e30, peaks=flops(1e30)))
    flat = mlperf_spec(1024, 64, kind="projection")
    points = predict_scaling(flat, quick, compression=8)
    for point in points:
        if point.towers < point.hosts:
            continue
        base = point.prediction.flat.step
        share = (base.forward + base.backward) / base.total
        bound = 1 / (1 - share + share / point.compression)
        # ids go once whatever is compressed, dense gradients shrink with over_arch's inputs
        assert point.prediction.dmt.speedup == pytest.approx(bound, rel=0.05)


def test_a_scarcer_network_gains_more() -> None:
    found = [
        speedups("h100", intra_gbps=3600.0, inter_gbps=rate)[64] for rate in (1600, 400, 100, 25)
    ]
    assert found == sorted(found)
    compute = [speedups("h100", compute_efficiency=share)[64] for share in (0.05, 0.2, 0.8)]
    exposed = []
    for share in (0.05, 0.2, 0.8):
        machine = make_machine("h100", 8, 8, comm_dtype="bf16", compute_efficiency=share)
        step = step_time(even_load(as_flat(WIDE), machine.network.cluster, 1.0), machine)
        exposed.append(step.exposed / step.total)
    assert exposed == sorted(exposed), compute


def test_newer_accelerators_spend_more_of_their_time_on_communication() -> None:
    """From V100 to H100 compute grew 30 times here, links 8 times."""
    shares = []
    for gpu in ("v100", "a100", "h100"):
        machine = make_machine(gpu, 8, 8, comm_dtype="bf16")
        flat = mlperf_spec(26, 128)
        step = step_time(even_load(as_flat(flat), machine.network.cluster, 1.0), machine)
        shares.append(step.exposed / step.total)
    assert shares[0] < min(shares[1:])
    gains = []
    for gpu in ("v100", "h100"):
        machine = make_machine(gpu, 8, 8, comm_dtype="bf16", batch=16384)
        points = predict_scaling(mlperf_spec(26, 128), machine, compression=8)
        gains.append(next(p.prediction.dmt.speedup for p in points if p.ranks == 64))
    assert gains[0] < gains[1]


def test_scaling_covers_all_sizes_and_keeps_towers_a_divisor() -> None:
    points = predict_scaling(mlperf_spec(26, 64), make_machine("a100", 3, 8), compression=4)
    assert [point.ranks for point in points] == [2**k for k in range(4, 15)]
    assert [point.towers for point in points[:5]] == [2, 4, 8, 16, 16]
    assert all(point.hosts % point.towers == 0 for point in points)
    assert all(point.compression == 4 for point in points)
    values = points[-1].to_json()
    assert values["dmt_speedup"] == pytest.approx(values["flat_ms"] / values["dmt_ms"])


def test_scaling_is_predicted_in_a_second() -> None:
    begin = time.process_time()
    predict_scaling(WIDE, make_machine("h100"), compression=4)
    assert time.process_time() - begin < 1


def test_compression_beyond_the_dim_is_refused() -> None:
    with pytest.raises(ConfigError, match="a compression of 64"):
        predict_scaling(mlperf_spec(8, 16), make_machine(), compression=64)


def test_a_suggestion_compresses_no_more_than_pays() -> None:
    machine = make_machine("h100", 8, 8)
    found = suggest(mlperf_spec(32, 128), machine)
    fastest = found.candidates[0]
    assert list(found.candidates) == sorted(found.candidates, key=lambda c: c.seconds)
    assert found.best.seconds <= fastest.seconds * (1 + TOLERANCE)
    assert all(
        c.compression >= found.best.compression - 1e-9
        for c in found.candidates
        if c.seconds <= fastest.seconds * (1 + TOLERANCE)
    )
    assert found.worth_it and found.best.speedup > 1.5
    assert len(found.to_json()["candidates"]) == 5
    endless = suggest(mlperf_spec(32, 128), make_machine("h100", 8, 8, inter_gbps=1e9))
    assert endless.best.compression <= found.best.compression


def test_candidates_are_what_predicting_them_gives() -> None:
    machine = make_machine("a100", 8, 4)
    found = suggest(mlperf_spec(32, 128), machine)
    chosen = next(c for c in found.candidates if c.towers == 8 and round(c.compression) == 4)
    model, plan = planned(machine, 8, 4)
    prediction = predict_plan(model, plan, machine)
    assert chosen.seconds == pytest.approx(prediction.dmt.step.total)
    assert chosen.speedup == pytest.approx(prediction.dmt.speedup)


def test_staying_flat_is_suggested_where_towers_do_not_pay() -> None:
    """One slow accelerator, an endless network: only the tower modules' own cost remains."""
    machine = make_machine("h100", 2, 8, inter_gbps=1e9, intra_gbps=10.0)
    found = suggest(mlperf_spec(4, 16, kind="cat"), machine)
    assert not found.worth_it
    assert found.to_json()["suggestion"]["beats_flat"] is False


def test_tables_that_fit_no_way_are_refused_with_the_plans_numbers() -> None:
    machine = make_machine("h100", 2, 2)
    cluster = replace(machine.network.cluster, hbm_bytes=2**20)
    small = replace(machine, network=replace(machine.network, cluster=cluster))
    with pytest.raises(PlanError, match="cannot hold"):
        suggest(mlperf_spec(8, 128), small)


def test_numbers_of_towers_that_do_not_fit_are_named() -> None:
    """Two of six tables are too much for one of four hosts, three in rows are not for two."""
    flat = mlperf_spec(6, 32, rows=40_000)
    machine = make_machine("h100", 4, 1)
    cluster = replace(machine.network.cluster, hbm_bytes=int(9.2e6 / 0.85))
    found = suggest(flat, replace(machine, network=replace(machine.network, cluster=cluster)))
    assert found.refused == (4,)
    assert {candidate.towers for candidate in found.candidates} == {2}


@given(
    hosts=st.integers(1, 64),
    most=st.integers(1, 300),
)
def test_numbers_of_towers_divide_or_multiply_the_hosts(hosts: int, most: int) -> None:
    counts = tower_counts(make_machine("h100", hosts, 1).network.cluster, most)
    assert counts == sorted(set(counts)) and counts
    assert all(hosts % count == 0 or count % hosts == 0 for count in counts)
    assert max(counts) <= most


@given(features=st.integers(1, 60), data=st.data())
def test_tables_are_dealt_evenly(features: int, data: st.DataObject) -> None:
    flat = mlperf_spec(features, 8, kind="cat")
    towers = data.draw(st.integers(1, features))
    assignment = deal_tables(flat, towers)
    assignment.check_covers(flat.feature_names)
    sizes = [len(names) for names in assignment.towers]
    assert len(sizes) == towers and max(sizes) - min(sizes) <= 1


def test_as_passthrough_of_towers_over_several_hosts_sends_more_than_flat() -> None:
    """Fewer towers than hosts: embeddings cross hosts inside the tower, then among peers."""
    machine = make_machine("h100", 8, 8)
    model, plan = planned(machine, 2, 1)
    load = planned_load(as_passthrough(model), plan, 1.0)
    assert load.group_hosts == 4 and load.groups == 2
    volume = sum(model.flat.feature_dims) * 4
    assert load.traffic.dmt_cross_bytes == pytest.approx(volume * (3 / 4 + 1 / 2))


def code_towers(model: DmtSpec, code: TowerCode) -> DmtSpec:
    """Let all towers send in a code."""
    towers = (replace(t, module=replace(t.module, code=code)) for t in model.towers)
    return replace(model, towers=tuple(towers))


def test_codes_are_counted_in_bytes_there_and_back() -> None:
    """Bytes are those of the plan; without a precision that is asked for, the code's both ways."""
    machine = make_machine("h100", 8, 8, comm_dtype=None)
    bare, _ = planned(machine, 8, 4)
    model = code_towers(bare, TowerCode(precision="int8", int4=32))
    plan = plan_model(model, machine.network.cluster)
    load = planned_load(model, plan, 1.0)
    assert load.traffic.tower_outputs == plan.traffic.tower_outputs
    assert load.traffic.output_gradients == plan.traffic.output_gradients
    # 4 features of 32 elements: 96 bytes, 16 of pairs of halves; 128 bytes and a scale of 2 back
    row = predict_plan(model, plan, machine).dmt
    assert (row.forward_bytes, row.gradient_bytes) == (7 * 112, 7 * 130)
    assert row.step.forward < row.step.backward
    wide = predict_plan(model, plan, replace(machine, comm_dtype="fp32")).dmt
    assert (wide.forward_bytes, wide.gradient_bytes) == (7 * 112, 7 * 512)
    assert model.compression == 4 * 32 * 128 / (8 * 112)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, 512), ("fp32", 512), ("bf16", 256), ("int8", 130)]
)
def test_a_precision_applies_to_towers_without_a_code(dtype: Any, expected: int) -> None:
    machine = make_machine("h100", 8, 8, comm_dtype=dtype)
    model, plan = planned(machine, 8, 4)
    row = predict_plan(model, plan, machine).dmt
    assert (row.forward_bytes, row.gradient_bytes) == (7 * expected, 7 * expected)


def test_copies_of_tables_exchange_less_and_pay_for_it_by_their_size() -> None:
    """By hand: AlltoAlls of half the hosts, and a ring over each rank's share of the tables."""
    machine = make_machine("h100", 4, 2, **NO_LATENCY, cross_efficiency=1.0, intra_efficiency=1.0)
    flat = mlperf_spec(32, 128)
    size = sum(table.rows * (table.dim * 4 + 4) for table in flat.tables)
    cluster = machine.network.cluster
    base = step_time(even_load(as_flat(flat), cluster, 1.0), machine)
    tight = replace(cluster, hbm_bytes=int(1.01 * size / 4 / 0.85))  # two hosts hold the tables
    there = replace(machine, network=replace(machine.network, cluster=tight))
    found = predict_copies(flat, there, 1.0, base.total)
    assert found is not None and found.copies == 2
    per_sample = 4 * sum(flat.feature_dims)
    assert found.forward_bytes == per_sample / 2 and base.forward > found.step.forward
    sync = 2 * size / 4 / 2 * 8e-9 / cluster.inter_gbps
    assert found.step.all_reduce - base.all_reduce == pytest.approx(sync, rel=1e-6)
    assert found.step.exposed >= sync
    rare = replace(machine.network, cluster=tight, assumptions=replace(
        machine.network.assumptions, sync_steps=100.0
    ))  # fmt: skip
    seldom = predict_copies(flat, replace(machine, network=rare), 1.0, base.total)
    assert seldom is not None
    assert found.step.total - seldom.step.total == pytest.approx(sync * 0.99, rel=1e-6)


def test_no_copies_where_memory_holds_one() -> None:
    machine = make_machine("h100", 4, 2)
    flat = mlperf_spec(32, 128)
    size = sum(table.rows * (table.dim * 4 + 4) for table in flat.tables)
    cluster = replace(machine.network.cluster, hbm_bytes=int(1.2 * size / 8 / 0.85))
    there = replace(machine, network=replace(machine.network, cluster=cluster))
    assert predict_copies(flat, there, 1.0, 1.0) is None


def test_embeddings_inside_the_hosts_of_a_tower_stay_float32() -> None:
    """As in the engine, whose precision is of what tower modules emit and of flat's exchange."""
    full, half = (make_machine("h100", 4, 2, comm_dtype=dtype) for dtype in ("fp32", "bf16"))
    model, plan = planned(full, 2, 4)  # a tower on two hosts
    loads = [planned_load(model, plan, 1.0, comm_dtype=m.comm_dtype) for m in (full, half)]
    inside = loads[0].traffic.tower_embeddings.cross_bytes
    assert inside > 0
    for load, machine in zip(loads, (full, half), strict=True):
        outputs = load.traffic.tower_outputs.cross_bytes
        assert crossing_bytes(load, machine)[0] == inside + outputs
    flat = even_load(as_flat(model.flat), full.network.cluster, 1.0)
    assert crossing_bytes(flat, half)[0] == crossing_bytes(flat, full)[0] / 2
