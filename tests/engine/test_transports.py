"""What NCCL makes of an exchange, one collective, is what gloo makes of it, a message per pair.

Ranks on CPUs take the way of NCCL over gloo; with an emulated GPU, so that tensors of the host that
would be given to NCCL, or mixed with those of the GPU, are noticed, and so is what the host waits
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.cluster.client import RunRanks

NCCL = {"environ": {"DMT_TESTS_STAND_FOR": "nccl"}}
PLAIN = [[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]]
LINEAR = [{"kind": "linear", "dim": 6}]
CUT = {
    "towers": [[[600, 64]], [[1100, 20]], [[21, 8], [40, 16]]],
    "interaction": "cat",
    "hbm_bytes": 100_000,
}
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x2, multi-hot": (2, 2, {"towers": PLAIN, "modules": LINEAR}),
    "2x2, single-hot, tables on every rank": (
        2,
        2,
        {"towers": PLAIN, "modules": LINEAR, "ids": "single", "everywhere": [1]},
    ),
    "2x2, int8": (2, 2, {"towers": PLAIN, "modules": LINEAR, "comm_dtype": "int8"}),
    "2x2, all cuts, means": (2, 2, {**CUT, "pooling": "mean"}),
    "1x3, all cuts, weights, hardly any ids": (1, 3, {**CUT, "weights": True, "ids": "rare"}),
    "3x1, vectors per tower, bf16": (
        3,
        1,
        {
            "towers": PLAIN,
            "modules": [{"kind": "dlrm", "c": 0, "p": 1, "dim": 6}],
            "comm_dtype": "bf16",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_both_ways_to_exchange_train_the_same(run_ranks: RunRanks, name: str) -> None:
    hosts, ranks, options = MODELS[name]
    job = {"pattern": "next", "steps": 4, "table_lr": 1.0, **options}
    pairwise = run_ranks(hosts, ranks, "send_ahead", **job)
    collective = run_ranks(hosts, ranks, "send_ahead", job=NCCL, **job)
    assert collective == pairwise
    assert len({str(found["losses"]) for found in pairwise}) == hosts * ranks


TRAINED = {"config": {"batch_size": 34, "dense_lr": 0.01, "table_lr": 0.05, "clip_norm": 1.0}}
GPU_MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "1x2, a rank without tables": (1, 2, {"towers": [[[90, 16]]], "modules": LINEAR}),
    "2x2, tables on every rank": (2, 2, {"towers": PLAIN, "modules": LINEAR, "everywhere": [1]}),
    "2x2, all cuts": (2, 2, CUT),
}

WAITS = {
    "1x2, a rank without tables": 1,
    "2x2, tables on every rank": 1,
    # two exchanges of ids; and gloo's reduce-scatter, which TorchRec makes of an all-reduce
    "2x2, all cuts": 3,
}
"""How often the host may wait in a step: ahead of time, and beside what is computed, for how many
ids come."""


def train(run_ranks: RunRanks, clicks: Path, name: str, **more: Any) -> list[dict[str, Any]]:
    hosts, ranks, options = GPU_MODELS[name]
    options = {**TRAINED, **options, **more, "data": str(clicks), "steps": 4}
    return run_ranks(hosts, ranks, "train_on_gpu", **options)


@pytest.mark.parametrize("name", GPU_MODELS)
def test_nothing_of_the_host_is_given_to_nccl(run_ranks: RunRanks, clicks: Path, name: str) -> None:
    on_cpu = train(run_ranks, clicks, name)
    on_gpu = train(run_ranks, clicks, name, job=NCCL)
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        for what in ("losses", "tables", "measured", "shards"):
            assert mine[what] == theirs[what], what
        assert mine["held"] and not theirs["held"]
        assert sum(mine["waits"].values()) <= WAITS[name], mine["waits"]
    if "without" in name:
        assert [found["shards"] for found in on_gpu] == [1, 0]


def test_a_tensor_of_the_host_is_noticed(run_ranks: RunRanks, clicks: Path) -> None:
    with pytest.raises(AssertionError, match="a tensor of the host is given to NCCL: all_reduce"):
        train(run_ranks, clicks, "1x2, a rank without tables", job=NCCL, broken="sums on the host")


def test_a_wait_for_the_gpu_is_noticed(run_ranks: RunRanks, clicks: Path) -> None:
    name = "1x2, a rank without tables"
    found = train(run_ranks, clicks, name, job=NCCL, broken="constants on the host")
    assert sum(found[0]["waits"].values()) > WAITS[name], found[0]["waits"]
