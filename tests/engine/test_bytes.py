"""What ranks hand to the process group for other hosts is what the plan says, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from support.cluster.client import RunRanks

ROWS = 4
TOWERS = [[[40, 16], [30, 16]], [[41, 16], [31, 16], [20, 16]], [[25, 16]]]
INT8 = {"precision": "int8"}


def linear(*codes: dict[str, Any]) -> list[dict[str, Any]]:
    """Linear modules of 5, 2 and 3 elements."""
    return [
        {"kind": "linear", "dim": dim, "code": code}
        for dim, code in zip((5, 2, 3), codes or [{}] * 3, strict=True)
    ]


CASES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "fp32": ({"modules": linear()}, [20, 8, 12], [20, 8, 12]),
    "bf16": (
        {"modules": linear(*[{"precision": "bf16"}] * 3)},
        [10, 4, 6],
        [10, 4, 6],
    ),
    "int8": ({"modules": linear(INT8, INT8, INT8)}, [5, 2, 3], [7, 4, 5]),
    "8 and 4 bits": (
        {"modules": linear({**INT8, "int4": 3}, {**INT8, "int4": 1}, INT8)},
        [4, 2, 3],
        [7, 4, 5],
    ),
    "one of each": (
        {"modules": linear({**INT8, "int4": 4}, {"precision": "bf16"}, {})},
        [3, 4, 12],
        [7, 4, 12],
    ),
    "int8 scaled": ({"modules": linear(), "comm_dtype": "int8"}, [7, 4, 5], [7, 4, 5]),
    "codes, gradients in bf16": (
        {"modules": linear(INT8, INT8, INT8), "comm_dtype": "bf16"},
        [5, 2, 3],
        [10, 4, 6],
    ),
    "vectors per feature, int8": (
        {"modules": [{"kind": "dlrm", "c": 1, "dim": 3, "code": {**INT8, "int4": 1}}]},
        [6, 9, 3],
        [8, 11, 5],
    ),
}
"""Options, and the bytes per sample of every tower, there and back."""


def check_bytes(found: list[dict[str, Any]]) -> None:
    """Compare what ranks handed over for the other host with what is planned."""
    size = len(found)
    for direction, way in enumerate(("forward", "backward")):
        moved = [[0] * size for _ in found]
        for source, one in enumerate(found):
            marks = one["marks"] if way == "forward" else 0
            for target, count in enumerate(one[way]):
                if source // 2 != target // 2 and count:
                    moved[source][target] = count - marks
        out, into = map(sum, moved), map(sum, zip(*moved, strict=True))
        total = sum(map(sum, moved))
        for one in found:
            assert total == one["mean"][direction] * ROWS * size
        assert max(*out, *into) == found[0]["busiest"][direction] * ROWS


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_measured_bytes_are_the_planned_ones(run_ranks: RunRanks, case: str) -> None:
    options, forward, backward = CASES[case]
    found = run_ranks(2, 2, "count_bytes", towers=TOWERS, rows_per_rank=ROWS, **options)
    assert found[0]["tower bytes"] == [forward, backward]
    check_bytes(found)
    found[1]["backward"][3] += 1
    with pytest.raises(AssertionError):
        check_bytes(found)
