"""Ids that are sent ahead, batches that come between: what is trained stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import RunRanks

TOWERS = [[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]]
CASE = {"towers": TOWERS, "modules": [{"kind": "dlrm", "c": 1, "dim": 8}]}
CUT = {
    "towers": [[[600, 64]], [[1100, 20]], [[10, 8], [40, 16]]],
    "interaction": "cat",
    "hbm_bytes": 100_000,
    "pooling": "mean",
}


@pytest.fixture(scope="module")
def not_ahead(run_ranks: RunRanks) -> list[dict[str, Any]]:
    return run_ranks(2, 2, "send_ahead", pattern="none", steps=6, table_lr=5.0, **CASE)


@pytest.mark.parametrize("pattern", ["next", "started", "two", "measured", "forgotten", "changed"])
def test_ids_sent_ahead_change_nothing(
    run_ranks: RunRanks, not_ahead: list[dict[str, Any]], pattern: str
) -> None:
    found = run_ranks(2, 2, "send_ahead", pattern=pattern, steps=6, table_lr=5.0, **CASE)
    assert found == not_ahead


def test_ids_sent_ahead_are_taken_up(run_ranks: RunRanks, not_ahead: list[dict[str, Any]]) -> None:
    """Ids that are written over are seen as they were sent; where they were not, they differ."""
    found = run_ranks(2, 2, "send_ahead", pattern="unsent", steps=6, table_lr=5.0, **CASE)
    assert found[0]["losses"] != not_ahead[0]["losses"]


def test_weighted_ids_of_cut_tables_are_sent_ahead(run_ranks: RunRanks) -> None:
    found = [
        run_ranks(2, 2, "send_ahead", pattern=pattern, steps=4, table_lr=5.0, **CUT)
        for pattern in ("none", "two")
    ]
    assert found[0] == found[1]


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


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_optimizer": "sgd", "table_optimizer": "sgd", "table_lr": 10.0, "dense_lr": 0.5},
        {"clip_norm": 0.05, "warmup_steps": 3, "lr_decay": "cosine"},
    ],
    ids=["sgd", "adam-adagrad-clipped"],
)
@pytest.mark.parametrize(("hosts", "ranks"), [(2, 2), (4, 1)])
def test_a_trainer_does_what_one_process_does(
    run_ranks: RunRanks, clicks: Path, changes: dict[str, Any], hosts: int, ranks: int
) -> None:
    """Rounding only: means over samples are taken rank by rank, and Adam divides by small roots."""
    config = {"batch_size": 34, "max_steps": 10, "eval_every": 10, "dense_lr": 0.01, **changes}
    towers = TOWERS if hosts == 2 else TOWERS[::2]
    modules = [{"kind": "dlrm", "c": 1, "p": 1, "dim": 6}]
    for found in run_ranks(
        hosts,
        ranks,
        "trainer_against_one_process",
        data=str(clicks),
        config=config,
        towers=towers,
        modules=modules,
    ):
        assert found["moved"] > 0.01
        assert max(found["losses"], found["log_loss"], found["tables"]) < 2e-6
