"""Tables on every rank beside towers: the flat model, all copies equal to the bit, all moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.cluster.client import RunRanks

TOLERANCE = 1e-6
"""Absolute, of losses and weights below 1: gradients of a row are summed rank by rank, then over
the ranks. 1.2e-7 was seen."""
TOWERS = [[[60, 16], [30, 16]], [[20, 16], [7, 16]], [[40, 16]]]
SGD: dict[str, Any] = {"optimizer": "sgd", "table_lr": 5.0}
ROWWISE: dict[str, Any] = {"optimizer": "rowwise-adagrad", "table_lr": 0.05}

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2x1, a tower between the others": (2, 1, {"everywhere": [1], **SGD}),
    "2x2, a shared table, means, row-wise": (
        2,
        2,
        {"everywhere": [1], "shared": [2], "pooling": "mean", **ROWWISE},
    ),
    "2x2, any width, weights, a network": (
        2,
        2,
        {
            "towers": [[[60, 16]], [[20, 6], [7, 3]], [[40, 16]]],
            "everywhere": [1],
            "interaction": "network",
            "weights": True,
            **SGD,
        },
    ),
    "1x2, one host, two such towers, hardly any ids": (
        1,
        2,
        {"everywhere": [0, 2], "ids": "rare", "interaction": "cat", **ROWWISE},
    ),
}


def check_copies(found: list[dict[str, Any]], count: int) -> None:
    """All ranks have the same copies, and every one of them moved."""
    assert all(one["replicas"] == found[0]["replicas"] for one in found)
    assert len(found[0]["replicas"]) == count
    assert all(one.get("moved_least", 1.0) > 1e-3 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_flat_model_but_for_the_order_of_sums(run_ranks: RunRanks, case: str) -> None:
    hosts, ranks, options = CASES[case]
    # plain TorchRec, which this is held against, has no weights beside ids
    against = "train_against_plain" if options.get("weights") else "train_against_flat"
    options = {"towers": TOWERS, **options}
    found = run_ranks(hosts, ranks, against, **options)
    check_copies(found, sum(len(options["towers"][t]) for t in options["everywhere"]))
    for one in found:
        keys = ("losses", "logits", "gradients", "tables", "dense")
        assert max(one[key] for key in keys if key in one) <= TOLERANCE
        assert one["moved"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("module", [{"dim": 3}, {"dim": 3, "code": {"precision": "int8"}}])
def test_linear_towers_beside_them_do_what_one_process_does(
    run_ranks: RunRanks, module: dict[str, Any]
) -> None:
    """In float32, and by the same codes; gradients of codes travel as codes do not."""
    options = {"everywhere": [2], "modules": [{"kind": "linear", **module}], **SGD}
    found = run_ranks(2, 2, "train_against_plain", towers=TOWERS, steps=8, **options)
    check_copies(found, 1)
    far = "code" in module  # gradients are sent in bf16 then
    for one in found:
        assert max(one["tables"], one["dense"]) <= (0.05 if far else TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["replicas stay", "replicas part"])
def test_copies_that_stay_or_part_are_noticed(run_ranks: RunRanks, broken: str) -> None:
    options = {"towers": TOWERS, "everywhere": [1], "steps": 8, **SGD}
    found = run_ranks(2, 1, "train_against_flat", broken=broken, **options)
    assert max(one["tables"] for one in found) > 10 * TOLERANCE
    with pytest.raises(AssertionError):
        check_copies(found, 2)


ONE_PROCESS: dict[str, dict[str, Any]] = {
    "sgd": {"dense_optimizer": "sgd", "table_optimizer": "sgd", "table_lr": 10.0, "dense_lr": 0.5},
    "adam, row-wise, clipped": {"clip_norm": 0.05, "warmup_steps": 3, "lr_decay": "cosine"},
    "element-wise": {"table_optimizer": "adagrad", "initial_accumulator": 0.01, "table_lr": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_PROCESS)
def test_a_trainer_does_what_one_process_does(run_ranks: RunRanks, clicks: Path, kind: str) -> None:
    """Sums that start from the first batch, learning rates that change, batches of odd sizes."""
    config = {"batch_size": 34, "max_steps": 10, "eval_every": 10, "dense_lr": 0.01}
    found = run_ranks(
        2,
        2,
        "trainer_against_one_process",
        data=str(clicks),
        config={**config, **ONE_PROCESS[kind]},
        towers=[[[20, 16], [30, 16], [40, 16]], [[25, 16]], [[20, 16], [31, 16]]],
        modules=[{"kind": "linear", "dim": 6}],
        everywhere=[2],
    )
    for one in found:
        assert one["moved"] > 0.01
        assert max(one["losses"], one["log_loss"], one["tables"]) < 2 * TOLERANCE


def test_adam_has_no_rule_for_summed_gradients() -> None:
    pytest.importorskip("torchrec", reason="trains over ranks, which needs torchrec")
    from torch import nn, zeros

    from dmt_convert.cluster.replicated import ReplicatedOptimizer
    from dmt_convert.errors import ConfigError

    ReplicatedOptimizer({}, "adam")
    with pytest.raises(ConfigError, match="tables on every rank moved by adam"):
        ReplicatedOptimizer({"t": nn.Parameter(zeros(2, 3))}, "adam")
