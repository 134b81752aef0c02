"""What must hold of any cost model, and the limits that can be computed by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.config import PlanConfig
from dmt_convert.errors import ConfigError, DmtError
from dmt_convert.placement import Cluster, make_cluster
from dmt_convert.placement import make_machine as configured_machine
from dmt_convert.placement.predict import Assumptions, Machine, StepTime, find_gpu
from dmt_convert.placement.predict.cost_model import (
    StepLoad,
    as_flat,
    as_passthrough,
    even_load,
    step_time,
)
from dmt_convert.placement.predict.machine import GPUS, Network, Peers
from dmt_convert.placement.predict.prediction import dealt_model
from dmt_convert.placement.traffic import Exchange
from support.machines import flops, make_machine
from support.specs import mlperf_spec

FLAT = mlperf_spec(64, 64)
GPU = st.sampled_from([gpu.name for gpu in GPUS])
HOSTS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
RANKS = st.sampled_from([1, 2, 4, 8])
BATCH = st.sampled_from([1, 256, 4096])
DTYPE = st.sampled_from(["fp32", "fp16", "bf16", "int8"])
RATIO = st.sampled_from([1.0, 2.0, 4.0, 8.0])


def load_of(machine: Machine, compression: float, towers: int | None = None) -> StepLoad:
    cluster = machine.network.cluster
    model = dealt_model(FLAT, towers or cluster.hosts, compression)
    assert model is not None
    return even_load(model, cluster, 1.0)


def steps(machine: Machine, compression: float) -> tuple[StepTime, StepTime, StepTime]:
    cluster = machine.network.cluster
    return (
        step_time(even_load(as_flat(FLAT), cluster, 1.0), machine),
        step_time(load_of(machine, 1.0), machine),
        step_time(load_of(machine, compression), machine),
    )


@given(gpu=GPU, hosts=HOSTS, ranks=RANKS, batch=BATCH, dtype=DTYPE, ratio=RATIO)
def test_more_bandwidth_is_never_slower(
    gpu: str, hosts: int, ranks: int, batch: int, dtype: str, ratio: float
) -> None:
    machine = make_machine(gpu, hosts, ranks, batch=batch, comm_dtype=dtype)
    for name in ("inter_gbps", "intra_gbps"):
        cluster = machine.network.cluster
        faster = replace(cluster, **{name: 3 * getattr(cluster, name)})  # type: ignore[arg-type]
        better = replace(machine, network=replace(machine.network, cluster=faster))
        for before, after in zip(steps(machine, ratio), steps(better, ratio), strict=True):
            assert after.total <= before.total
    quick = replace(
        machine, gpu=replace(machine.gpu, peaks=flops(1e16), hbm_bytes_per_s=1e14, name="quick")
    )
    for before, after in zip(steps(machine, ratio), steps(quick, ratio), strict=True):
        assert after.total <= before.total


@given(gpu=GPU, hosts=HOSTS, ranks=RANKS, dtype=DTYPE)
def test_more_compression_never_sends_more(gpu: str, hosts: int, ranks: int, dtype: str) -> None:
    machine = make_machine(gpu, hosts, ranks, comm_dtype=dtype)
    loads = [load_of(machine, ratio) for ratio in (1.0, 2.0, 4.0, 8.0)]
    sent = [load.traffic.dmt_cross_bytes for load in loads]
    assert sent == sorted(sent, reverse=True)
    times = [step_time(load, machine) for load in loads]
    assert [t.forward for t in times] == sorted((t.forward for t in times), reverse=True)


@given(hosts=HOSTS, ranks=RANKS, ratio=RATIO)
def test_narrower_numbers_are_never_slower(hosts: int, ranks: int, ratio: float) -> None:
    totals = [
        [s.total for s in steps(make_machine("a100", hosts, ranks, comm_dtype=dtype), ratio)]
        for dtype in ("fp32", "bf16", "int8")
    ]
    for wide, narrow in itertools.pairwise(totals):
        assert all(n <= w for n, w in zip(narrow, wide, strict=True))


@given(gpu=GPU, hosts=HOSTS, ranks=RANKS, batch=BATCH, ratio=RATIO)
def test_a_step_is_the_sum_of_its_parts(
    gpu: str, hosts: int, ranks: int, batch: int, ratio: float
) -> None:
    for step in steps(make_machine(gpu, hosts, ranks, batch=batch), ratio):
        parts = (
            step.overhead, step.lookup, step.reshuffle, step.tower, step.dense, step.exposed
        )  # fmt: skip
        assert step.total == pytest.approx(math.fsum(parts))
        assert 0 <= step.exposed <= step.communication * (1 + 1e-12)
        assert math.isfinite(step.total) and min(parts) >= 0


@given(ranks=RANKS, batch=BATCH)
def test_one_host_crosses_nothing_and_is_the_same_flat_or_in_towers(ranks: int, batch: int) -> None:
    machine = make_machine("h100", 1, ranks, batch=batch)
    slow = make_machine("h100", 1, ranks, batch=batch, inter_gbps=1e-6)
    flat, sptt, _ = steps(machine, 1.0)
    assert sptt == flat
    assert steps(slow, 1.0)[0] == flat
    if ranks == 1:
        assert flat.communication == 0


@given(hosts=HOSTS, ranks=RANKS)
def test_sptt_sends_between_hosts_what_flat_sends(hosts: int, ranks: int) -> None:
    machine = make_machine("h100", hosts, ranks)
    flat = even_load(as_flat(FLAT), machine.network.cluster, 1.0)
    sptt = load_of(machine, 1.0)
    volume = sum(FLAT.feature_dims) * 4
    assert flat.traffic.dmt_cross_bytes == pytest.approx(volume * (hosts - 1) / hosts)
    assert sptt.traffic.dmt_cross_bytes == pytest.approx(flat.traffic.dmt_cross_bytes)


def test_sptt_gains_only_by_smaller_collectives() -> None:
    """Without latency and loss of scale the link needs as long for SPTT as for flat."""
    free = {"launch_us": 0.0, "cross_message_us": 0.0, "intra_message_us": 0.0, "scale_loss": 0.0}
    machine = make_machine("h100", 16, 8, intra_gbps=1e12, **free)
    flat, sptt, _ = steps(machine, 1.0)
    assert sptt.forward == pytest.approx(flat.forward, rel=1e-6)
    known = make_machine("h100", 16, 8, intra_gbps=1e12)
    flat, sptt, _ = steps(known, 1.0)
    assert sptt.forward < flat.forward


def test_a_lone_exchange_by_hand() -> None:
    machine = make_machine("h100", 4, 2, scale_loss=0.25, cross_message_us=3.0, launch_us=10.0)
    exchange = Exchange(cross_bytes=1000.0, intra_bytes=1.0)
    seconds = machine.network.all_to_all(exchange, 1000, Peers.of_all(machine.network.cluster))
    rate = 400e9 / 8 * 0.97 / (1 + 0.25 * 3)
    assert seconds == pytest.approx(10e-6 + 6 * 3e-6 + 1e6 / rate)
    inside = Exchange(cross_bytes=0.0, intra_bytes=1e6)
    seconds = machine.network.all_to_all(inside, 1000, Peers(cross=0, intra=1))
    assert seconds == pytest.approx(10e-6 + 0.6e-6 + 1e9 * 8e-9 / (3600 * 0.82))


def test_an_all_reduce_by_hand() -> None:
    network = make_machine("h100", 4, 2, scale_loss=0.0).network
    cross = 2 * 8e6 * 3 / 4 / 2 * 8e-9 / (400 * 0.97)
    hops = 14e-6 * 2 + 3.4e-6 * 1
    assert network.all_reduce(8e6, 4) == pytest.approx(8.4e-6 + 2 * hops + cross)
    assert network.all_reduce(0.0, 4) == 0
    lonely = make_machine("h100", 1, 1).network
    assert lonely.all_reduce(8e6, 1) == 0


def test_a_measured_alltoall_is_met_within_a_sixth() -> None:
    """64 H800 on 8 hosts, 8 MiB per rank: 338 and 296 us (NVIDIA/nccl issue 1531)."""
    cluster = Cluster(hosts=8, ranks_per_host=8, inter_gbps=400.0)
    network = Network(cluster=cluster, assumptions=Assumptions())
    per_peer = 8 * 2**20 / 64
    exchange = Exchange(cross_bytes=56 * per_peer, intra_bytes=7 * per_peer)
    seconds = network.all_to_all(exchange, 1, Peers.of_all(cluster))
    assert seconds == pytest.approx(317e-6, rel=1 / 6)


def test_what_may_hide_is_hidden_and_nothing_more() -> None:
    """With endless compute only the exchanges of embeddings that exceed dense_arch show."""
    machine = make_machine("h100", 8, 8)
    slow = replace(machine, gpu=replace(machine.gpu, peaks=flops(1e6)))
    quick = replace(machine, gpu=replace(machine.gpu, peaks=flops(1e30), hbm_bytes_per_s=1e30))
    for load in (load_of(machine, 1.0), even_load(as_flat(FLAT), machine.network.cluster, 1.0)):
        assert step_time(load, slow).exposed == 0
        bare = step_time(load, quick)
        assert bare.exposed == pytest.approx(bare.communication)
    blind = make_machine("h100", 8, 8, prefetch=0.0)
    slow = replace(blind, gpu=replace(blind.gpu, peaks=flops(1e6)))
    step = step_time(load_of(blind, 1.0), slow)
    assert step.exposed == pytest.approx(step.indices)


def test_tower_modules_of_a_group_run_for_all_samples_of_its_peers() -> None:
    machine = make_machine("h100", 4, 2, compute_efficiency=1.0)
    load = load_of(machine, 4.0)
    flops = sum(work.flops for work in load.work.towers)
    expected = 3 * flops * machine.batch / machine.gpu.flops_per_s
    assert step_time(load, machine).tower == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_no_batch_but_a_whole_positive_one(value: int) -> None:
    with pytest.raises(ConfigError, match="--batch"):
        make_machine(batch=value)


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--comm-dtype fp64") as error:
        make_machine(comm_dtype="fp64")
    assert "int8" in error.value.expected


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("scale_loss", "--assume scale_loss"),
        ("scale_loss=", "--assume scale_loss="),
        ("no_such=1", "--assume no_such=1"),
        ("scale_loss=x", "--assume scale_loss=x"),
        ("scale_loss=-1", "scale_loss is -1.0"),
        ("scale_loss=nan", "scale_loss is nan"),
        ("cross_efficiency=0", "cross_efficiency is 0.0"),
        ("compute_efficiency=1.01", "compute_efficiency is 1.01"),
        ("prefetch=2", "prefetch is 2.0"),
    ],
)
def test_constants_that_no_step_has_are_refused(setting: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        Assumptions().override([setting])
    assert found in str(error.value)
    assert error.value.hint


def test_constants_are_replaced_one_by_one() -> None:
    known = Assumptions().override(["scale_loss=0.1", "launch_us=1"])
    assert known == Assumptions(scale_loss=0.1, launch_us=1.0)


def test_presets_are_found_by_name() -> None:
    assert find_gpu("H100").inter_gbps == 400
    with pytest.raises(ConfigError, match="--gpu b400") as error:
        find_gpu("b400")
    assert "v100, a100, h100" in error.value.expected


def test_the_passthrough_twin_has_the_same_towers() -> None:
    model = dealt_model(FLAT, 8, 4.0)
    assert model is not None
    twin = as_passthrough(model)
    assert twin.assignment == model.assignment and twin.compression == 1


def test_products_are_predicted_as_training_computes_them() -> None:
    """TF32 unless it is told otherwise; float32 takes 7.4 times as long."""
    gpu = find_gpu("h100")
    assert gpu.flops_per_s == 494.7e12
    highest, medium = (
        replace(gpu, matmul_precision="highest"),
        replace(gpu, matmul_precision="medium"),
    )
    assert (highest.flops_per_s, medium.flops_per_s) == (66.9e12, 989.4e12)
    config = PlanConfig(hosts=2, ranks_per_host=8, predict=True, gpu="h100")
    machine = configured_machine(config, make_cluster(config))
    assert machine.gpu == gpu
    asked = PlanConfig(**config.model_dump() | {"matmul_precision": "highest"})
    assert configured_machine(asked, make_cluster(asked)).gpu == highest


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_presets_are_of_one_kind(gpu: Any) -> None:
    assert gpu.peaks["highest"] <= gpu.peaks["high"] <= gpu.peaks["medium"]
    assert gpu.inter_gbps < gpu.intra_gbps < gpu.hbm_bytes_per_s * 8e-9
    assert find_gpu(gpu.name.upper()) is gpu


def test_a_pod_is_a_host_of_all_its_ranks() -> None:
    """NVL72: 36 hosts of four GPUs are two pods of 72, each with its own towers."""
    config = PlanConfig(hosts=36, ranks_per_host=4, hosts_per_pod=18, predict=True, gpu="gb200")
    cluster = make_cluster(config)
    assert (cluster.hosts, cluster.ranks_per_host) == (2, find_gpu("gb200").domain_ranks)
    with pytest.raises(ConfigError, match="36 hosts in pods of 16") as refused:
        make_cluster(PlanConfig(**config.model_dump() | {"hosts_per_pod": 16}))
    assert refused.value.expected == "whole pods"
    with pytest.raises(DmtError, match="with --out"):
        PlanConfig(**config.model_dump() | {"out": Path("p.json")})
