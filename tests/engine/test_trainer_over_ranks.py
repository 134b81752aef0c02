"""Training steps over ranks, copies of rows and all, against one process and without prefetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.cluster.client import RunRanks

TOWERS = [[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]]
CASE = {"towers": TOWERS, "modules": [{"kind": "dlrm", "c": 1, "dim": 8}]}


SETTINGS = {
    "batch_size": 34,  # leaves copies on some ranks, and a smaller batch at the end of a pass
    "table_optimizer": "rowwise-adagrad",
    "table_lr": 0.05,
    "dense_lr": 0.01,
    "initial_accumulator": 0.01,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"measure_every": 1}, {"restart_at": 4}, {"measure_every": 2, "restart_at": 5}],
    ids=lambda changes: "-".join(changes),
)
def test_a_trainer_does_the_same_with_ids_sent_ahead(
    run_ranks: RunRanks, clicks: Path, changes: dict[str, int]
) -> None:
    steps = {"steps": 8, "data": str(clicks), **CASE}
    without = run_ranks(2, 2, "train_with_trainer", config={**SETTINGS, "prefetch": False}, **steps)
    ahead = run_ranks(
        2, 2, "train_with_trainer", config={**SETTINGS, "prefetch": True}, **changes, **steps
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_PROCESS)
@pytest.mark.parametrize(("hosts", "ranks"), [(2, 2), (4, 1)])
def test_a_trainer_does_what_one_process_does(
    run_ranks: RunRanks, clicks: Path, kind: str, hosts: int, ranks: int
) -> None:
    assert max(compare(run_ranks, clicks, hosts, ranks, kind)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_PROCESS)
def test_a_broken_engine_is_not_what_one_process_does(
    run_ranks: RunRanks, clicks: Path, kind: str
) -> None:
    found = compare(run_ranks, clicks, 2, 2, kind, broken="undivided gradients")
    assert min(found) > 100 * TOLERANCE


ANY_WIDTH = [[[20, 9], [30, 1], [40, 16]], [[25, 6], [22, 9]]]
WIDTHS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x1, a network, row-wise Adagrad": (2, 1, {"interaction": "network"}),
    "2x1, sums per element": (
        2,
        1,
        {"interaction": "network", "more": {"table_optimizer": "adagrad"}},
    ),
    "2x2, rows over both ranks, vectors per tower, row-wise Adagrad": (
        2,
        2,
        {
            "interaction": "cat",
            "modules": [{"kind": "dlrm", "c": 1, "p": 1, "dim": 6}],
            "towers": [[[600, 9]], [[21, 1], [31, 6]]],
            "hbm_bytes": 20_000,
        },
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.exhaustive if case.endswith("element") else ())
        for case in WIDTHS
    ],
)
def test_tables_of_any_width(run_ranks: RunRanks, clicks: Path, case: str) -> None:
    hosts, ranks, options = WIDTHS[case]
    assert max(compare_widths(run_ranks, clicks, hosts, ranks, **options)) < TOLERANCE


def compare_widths(
    run_ranks: RunRanks, clicks: Path, hosts: int, ranks: int, more: Any = None, **options: Any
) -> list[float]:
    """The largest difference that any rank finds; passthrough models are the flat ones."""
    config = {"batch_size": 34, "max_steps": 10, "eval_every": 10, "dense_lr": 0.01}
    found = run_ranks(
        hosts,
        ranks,
        "trainer_against_one_process",
        data=str(clicks),
        config=config | (more or {}),
        **{"towers": ANY_WIDTH, **options},
    )
    assert all(one["moved"] > 0.01 for one in found)
    return [max(one["losses"], one["log_loss"], one["tables"]) for one in found]


def test_a_mean_over_columns_of_zeros_is_noticed(run_ranks: RunRanks, clicks: Path) -> None:
    options = {"interaction": "network", "broken": "same learning rate"}
    assert min(compare_widths(run_ranks, clicks, 2, 1, **options)) > 100 * TOLERANCE
