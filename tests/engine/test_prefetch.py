"""Ids that are sent ahead, batches that come between: what is trained stays the same."""

from __future__ import annotations

from typing import Any

import pytest

from support.cluster.client import RunRanks

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


@pytest.mark.slow
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
