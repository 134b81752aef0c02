"""Tables in host memory, of which ranks keep rows, are trained as all others."""

from __future__ import annotations

from support.cluster.client import RunRanks

TOLERANCE = 1e-6
"""As in `test_flat_equality`."""


def test_tables_in_host_memory_are_trained_as_others(run_ranks: RunRanks) -> None:
    """On CPUs, where nothing has to be kept elsewhere: TorchRec takes the plan of such tables."""
    towers = [[[600, 64]], [[50, 16], [30, 16]]]
    options = {"towers": towers, "interaction": "cat", "optimizer": "rowwise-adagrad"}
    for found in run_ranks(
        2, 1, "train_against_flat", hbm_bytes=120_000, table_lr=0.05, steps=5, **options
    ):
        assert found["cached"] == ["t0"]
        assert found["moved"] > 0.01
        assert max(found["losses"], found["tables"], found["dense"]) <= TOLERANCE
