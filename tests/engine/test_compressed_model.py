"""A compressed model over ranks is the same model in plain torch on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

from support.cluster.client import RunRanks

TOLERANCE = 1e-6
"""Absolute, of logits, gradients and weights below 1: every gradient is a mean over samples, taken
rank by rank here and at once there. 6e-8 was seen."""

TOWERS = [[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]]
OUT_OF_ORDER = [[[40, 16]], [[40, 16]], [[40, 16], [40, 16], [40, 16]], [[40, 16]]]
MIXED = [[[600, 64]], [[1100, 20]], [[10, 8], [40, 16], [12, 8]], [[30, 16], [3, 4], [9, 8]]]


def dlrm(*dims: int, c: int = 1, p: int = 0) -> list[dict[str, Any]]:
    return [{"kind": "dlrm", "c": c, "p": p, "dim": dim} for dim in dims]


LINEAR = [{"kind": "linear", "dim": dim} for dim in (9, 4, 5)]
DCN = [{"kind": "dcn", "dim": 6, "cross_layers": 1, "cross_rank": 4}]
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "1x1, vectors per feature": (1, 1, {"towers": TOWERS, "modules": dlrm(8)}, {}),
    "1x4, vectors per feature and per tower": (
        1,
        4,
        {"towers": TOWERS, "modules": dlrm(4, p=2)},
        {},
    ),
    "2x2, a dim per tower, out of order": (
        2,
        2,
        {"towers": OUT_OF_ORDER, "modules": dlrm(8, 5, 3, 2)},
        {"order": [2, 0, 1, 3]},
    ),
    "2x2, vectors per tower only, means": (
        2,
        2,
        {"towers": TOWERS, "modules": dlrm(8, c=0, p=1), "pooling": "mean"},
        {},
    ),
    "2x2, weighted means, rows over both ranks": (
        2,
        2,
        {
            "towers": [[[600, 16]], [[1100, 16]], [[10, 16], [40, 16]], [[30, 16]]],
            "modules": dlrm(8),
            "pooling": "mean",
            "weights": True,
            "hbm_bytes": 70_000,
        },
        {"cuts": ["table_column_wise 1", "table_row_wise 2"]},
    ),
    "2x2, vectors per feature and per tower, shared tables": (
        2,
        2,
        {"towers": TOWERS, "modules": dlrm(6, p=1), "shared": [1, 4]},
        {},
    ),
    "2x2, vectors per feature of different dims": (
        2,
        2,
        {"towers": MIXED, "modules": dlrm(8, 5), "interaction": "cat", "shared": [3]},
        {"order": [0, 1, 3, 2]},
    ),
    "2x4, ranks without a table": (
        2,
        4,
        {"towers": [[[20, 16], [30, 16]], [[25, 16]]], "modules": dlrm(6, c=2)},
        {},
    ),
    "2x2, cross networks": (2, 2, {"towers": TOWERS, "modules": DCN, "interaction": "dcn"}, {}),
    "2x2, a network behind linear maps": (
        2,
        2,
        {"towers": TOWERS, "modules": LINEAR, "interaction": "network", "shared": [1]},
        {},
    ),
    "2x2, linear maps, dot": (2, 2, {"towers": TOWERS, "modules": LINEAR}, {}),
    "4x1, a tower over two hosts": (
        4,
        1,
        {"towers": TOWERS[::2], "modules": dlrm(8, 4)},
        {"hosts_per_tower": 2},
    ),
    "4x2, cross networks over two hosts each": (
        4,
        2,
        {"towers": TOWERS[::2], "modules": DCN, "interaction": "dcn"},
        {"hosts_per_tower": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_model(run_ranks: RunRanks, case: str) -> None:
    hosts, ranks, options, expected = CASES[case]
    found = run_ranks(hosts, ranks, "train_against_plain", table_lr=5.0, steps=8, **options)
    for one in found:
        assert one["moved"] > 0.002, "tables that do not move prove nothing"
        assert {name: one[name] for name in expected} == expected
        largest = max(one[name] for name in ("logits", "gradients", "tables", "dense"))
        assert largest <= (0 if len(found) == 1 else TOLERANCE)
    check_gradients(found, len(options["towers"]))


INT8, MIXED_BITS = {"precision": "int8"}, {"precision": "int8", "int4": 3}


def coded(*codes: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The linear modules above, with codes."""
    pairs = zip(LINEAR, codes * 3, strict=False)
    return [module | ({} if code is None else {"code": code}) for module, code in pairs]


EQUAL = [[[40, 16], [30, 16]], [[41, 16], [31, 16]]]
CODED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x2, bf16": (2, 2, {"towers": TOWERS, "modules": coded({"precision": "bf16"})}),
    "2x2, int8": (2, 2, {"towers": TOWERS, "modules": coded(INT8)}),
    "2x2, 8 and 4 bits": (2, 2, {"towers": TOWERS, "modules": coded(MIXED_BITS)}),
    "2x2, one of each": (
        2,
        2,
        {"towers": TOWERS, "modules": coded(None, MIXED_BITS, {"precision": "bf16"})},
    ),
    "2x2, vectors per feature, out of order": (
        2,
        2,
        {
            "towers": OUT_OF_ORDER,
            "modules": [each | {"code": MIXED_BITS} for each in dlrm(8, 5, 3, 4)],
        },
    ),
    "1x2, one host": (1, 2, {"towers": TOWERS, "modules": coded(MIXED_BITS)}),
    "2x1, a tower over two hosts": (2, 1, {"towers": TOWERS[:1], "modules": coded(INT8)}),
}
STEP = 0.01
"""Larger than what one level moves a logit by in these models. A level has some 1/255 of a range
near 2."""


def check_coded(found: list[dict[str, Any]], rows: int = 4) -> None:
    """Logits are the plain model's, which rounds to the same levels.

    An element on the edge between two levels may fall to either side, since sums of float32 round
    in another order; then its logit is off by a level. One in a hundred thousand is so near.
    """
    assert sum(one["flips"] for one in found) <= rows * len(found) // 8
    for one in found:
        assert one["moved"] > 0.0005, "tables that do not move prove nothing"
        largest = max(one[name] for name in ("logits", "gradients", "tables", "dense"))
        assert largest <= STEP


@pytest.mark.slow
@pytest.mark.parametrize("case", CODED)
def test_what_travels_in_a_code_is_the_plain_model(run_ranks: RunRanks, case: str) -> None:
    """Gradients travel as fp32 here: they pass the code as if nothing had been rounded."""
    hosts, ranks, options = CODED[case]
    options = {**options, "table_lr": 5.0, "steps": 1, "comm_dtype": "fp32"}
    found = run_ranks(hosts, ranks, "train_against_plain", **options)
    check_coded(found)
    for one in found:
        if not one["flips"]:
            assert one["gradients"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["ranges of others", "rounded before"])
def test_other_levels_are_noticed(run_ranks: RunRanks, broken: str) -> None:
    modules = [{"kind": "linear", "dim": 6, "code": INT8}] * 2
    options = {"towers": EQUAL, "modules": modules, "table_lr": 5.0, "steps": 1}
    check_coded(run_ranks(2, 1, "train_against_plain", comm_dtype="fp32", **options))
    found = run_ranks(2, 1, "train_against_plain", comm_dtype="fp32", broken=broken, **options)
    with pytest.raises(AssertionError):
        check_coded(found)


@pytest.mark.slow
def test_hosts_with_other_ranges_are_refused(run_ranks: RunRanks) -> None:
    modules = [{"kind": "linear", "dim": 6, "code": INT8}] * 2
    with pytest.raises(AssertionError, match="2 different codes of the same towers on 2 hosts"):
        run_ranks(
            2, 1, "train_against_plain", towers=EQUAL, modules=modules, broken="ranges of one host"
        )


@pytest.mark.slow
@pytest.mark.parametrize("code", [INT8, MIXED_BITS])
def test_levels_do_not_hide_that_training_diverged(
    run_ranks: RunRanks, code: dict[str, Any]
) -> None:
    """The first host's tower emits what is not finite: all samples of both hosts are lost."""
    found = run_ranks(2, 1, "diverge", towers=EQUAL, modules=coded(code), ids="single")
    assert [one["lost"] for one in found] == [1.0, 1.0]


def check_gradients(found: list[dict[str, Any]], num_towers: int) -> None:
    """All ranks that have a parameter have the same gradient of it, to the bit."""
    by_name: dict[str, set[str]] = {}
    for one in found:
        for name, digest in one["digests"].items():
            by_name.setdefault(name, set()).add(digest)
    assert {name.split(".")[1] for name in by_name if name.startswith("towers.")} == {
        str(tower) for tower in range(num_towers)
    }
    assert {name: digests for name, digests in by_name.items() if len(digests) > 1} == {}


@pytest.mark.slow
def test_gradients_that_stay_on_their_rank_are_noticed(run_ranks: RunRanks) -> None:
    found = run_ranks(
        2,
        2,
        "train_against_plain",
        towers=TOWERS,
        modules=dlrm(8),
        steps=1,
        broken="own tower gradients",
    )
    assert all(one["gradients"] > 20 * TOLERANCE for one in found)
    with pytest.raises(AssertionError, match=r"towers\.0\.tower_module"):
        check_gradients(found, len(TOWERS))
