"""Training steps over ranks, copies of rows and all, against one process and without prefetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import RunRanks

TOWERS = [[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]]
CASE = {"towers": TOWERS, "modules": [{"kind": "dlrm", "c": 1, "dim": 8}]}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {
        "batch_size": 34,  # leaves copies on some ranks, and a smaller batch at the end of a pass
        "table_optimizer": "rowwise-adagrad",
        "table_lr": 0.05,
        "dense_lr": 0.01,
        "initial_accumulator": 0.01,
    }


@pytest.mark.parametrize(
    "changes",
    [{"measure_every": 1}, {"restart_at": 4}, {"measure_every": 2, "restart_at": 5}],
    ids=lambda changes: "-".join(changes),
)
def test_a_trainer_does_the_same_with_ids_sent_ahead(
    run_ranks: RunRanks, clicks: Path, settings: dict[str, Any], changes: dict[str, int]
) -> None:
    steps = {"steps": 8, "data": str(clicks), **CASE}
    without = run_ranks(2, 2, "train_with_trainer", config={**settings, "prefetch": False}, **steps)
    ahead = run_ranks(
        2, 2, "train_with_trainer", config={**settings, "prefetch": True}, **changes, **steps
    )
    for mine, theirs in zip(ahead, without, strict=True):
        assert (mine["losses"], mine["tables"]) == (theirs["losses"], theirs["tables"])
        assert len(mine["measured"]) == (8 // changes.get("measure_every", 9))


ONE_PROCESS: dict[str, dict[str, Any]] = {
    "sgd": {"dense_optimizer": "sgd", "table_optimizer": "sgd", "table_lr": 10.0, "dense_lr": 0.5},
    "adam, adagrad, clipped": {"clip_norm": 0.05, "warmup_steps": 3, "lr_decay": "cosine"},
}
TOLERANCE = 2e-6
"""Absolute, of losses and tables below 1: means over samples are taken rank by rank, and Adam and
Adagrad divide by roots of them. 1.5e-7 was seen."""


def compare(
    run_ranks: RunRanks, clicks: Path, hosts: int, ranks: int, kind: str, **options: Any
) -> list[float]:
    """The largest difference that any rank finds, of losses and tables."""
    config = {"batch_size": 34, "max_steps": 10, "eval_every": 10, "dense_lr": 0.01}
    found = run_ranks(
        hosts,
        ranks,
        "trainer_against_one_process",
        data=str(clicks),
        config={**config, **ONE_PROCESS[kind]},
        towers=TOWERS if hosts == 2 else TOWERS[::2],
        modules=[{"kind": "dlrm", "c": 1, "p": 1, "dim": 6}],
        **options,
    )
    assert all(one["moved"] > 0.01 for one in found)
    return [max(one["losses"], one["log_loss"], one["tables"]) for one in found]


@pytest.mark.parametrize("kind", ONE_PROCESS)
@pytest.mark.parametrize(("hosts", "ranks"), [(2, 2), (4, 1)])
def test_a_trainer_does_what_one_process_does(
    run_ranks: RunRanks, clicks: Path, kind: str, hosts: int, ranks: int
) -> None:
    assert max(compare(run_ranks, clicks, hosts, ranks, kind)) < TOLERANCE


@pytest.mark.parametrize("kind", ONE_PROCESS)
def test_a_broken_engine_is_not_what_one_process_does(
    run_ranks: RunRanks, clicks: Path, kind: str
) -> None:
    found = compare(run_ranks, clicks, 2, 2, kind, broken="undivided gradients")
    assert min(found) > 100 * TOLERANCE
