"""Global batches that are dealt to ranks are the batches of one process, for every format.

Letters: G rows of a global batch, W ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.data import (
    Batch,
    Dataset,
    Share,
    adapt_batches,
    adapt_shares,
    deal_batches,
    take_range,
)
from dmt_convert.data.batch import join_batches, take_rows
from dmt_convert.data.dataset import RowBatches, TakeRows
from dmt_convert.errors import DataError
from dmt_convert.spec import ModelSpec
from support.data_files import assert_same_rows
from support.specs import build_spec

VARIANTS = ("repository-npz", "probe-npz", "criteo-npy", "criteo-tsv gzip", "parquet")


@pytest.fixture(scope="module")
def datasets(datasets: dict[str, Dataset]) -> dict[str, Dataset]:
    """As everywhere; `range` is some of the rows of one."""
    return {**datasets, "range": take_range(datasets["parquet"], 2, 9)}


def global_batches(dataset: Dataset, size: int, seed: int | None) -> list[tuple[Batch, list[int]]]:
    """The batches of one process, with their row numbers."""
    batches = dataset.batches(size, shuffle_seed=seed)
    assert isinstance(batches, RowBatches)
    return [(batch, batches.rows.tolist()) for batch in batches]


def deal(dataset: Dataset, order: dict[str, Any], **options: int) -> list[tuple[Share, ...]]:
    """The shares of all ranks, batch by batch."""
    ranks = [
        list(
            deal_batches(
                dataset,
                order["batch_size"],
                rank=rank,
                world_size=order["world_size"],
                shuffle_seed=order["shuffle_seed"],
                **options,
            )
        )
        for rank in range(order["world_size"])
    ]
    return list(zip(*ranks, strict=True))


orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 14),
        "shuffle_seed": st.none() | st.integers(0, 50),
        "world_size": st.integers(1, 14),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, "range"])
@settings(max_examples=20)
@given(order=orders)
def test_shares_together_are_the_batches_of_one_process(
    datasets: dict[str, Dataset], variant: str, order: dict[str, Any]
) -> None:
    dataset = datasets[variant]
    wanted = global_batches(dataset, order["batch_size"], order["shuffle_seed"])
    dealt = deal(dataset, order)
    assert len(dealt) == len(wanted)
    for shares, (batch, rows) in zip(dealt, wanted, strict=True):
        counted = [take_rows(s.batch, slice(0, s.counted)) for s in shares if s.counted]
        assert_same_rows(join_batches(counted), batch)
        assert [row for s in shares for row in s.rows[: s.counted].tolist()] == rows
        assert {s.total for s in shares} == {batch.num_rows}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(order=orders)
def test_all_ranks_have_as_many_rows_and_copies_are_copies(
    datasets: dict[str, Dataset], variant: str, order: dict[str, Any]
) -> None:
    dataset = datasets[variant]
    (whole,) = dataset.batches(dataset.num_rows)
    for shares in deal(dataset, order):
        size = math.ceil(shares[0].total / order["world_size"])
        for share in shares:
            assert share.batch.num_rows == len(share.rows) == size
            assert_same_rows(share.batch, take_rows(whole, share.rows))
            # a rank that has nothing of its own copies the batch's last row
            last = max(share.counted - 1, 0)
            assert set(share.rows[last:].tolist()) == {int(share.rows[last])}
        assert sum(share.counted for share in shares) == shares[0].total
        assert all(share.counted == size for share in shares[: shares[0].total // size])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(order=orders, start=st.integers(0, 12))
def test_batches_can_be_skipped(
    datasets: dict[str, Dataset], variant: str, order: dict[str, Any], start: int
) -> None:
    dataset = datasets[variant]
    through, resumed = deal(dataset, order)[start:], deal(dataset, order, start_batch=start)
    assert len(through) == len(resumed)
    for mine, theirs in zip(through, resumed, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert_same_rows(one.batch, other.batch)
            assert one.rows.tolist() == other.rows.tolist()
            assert (one.counted, one.total) == (other.counted, other.total)


@settings(max_examples=20)
@given(order=orders)
def test_a_number_of_ranks_is_not_seen_in_the_batches(
    datasets: dict[str, Dataset], order: dict[str, Any]
) -> None:
    """What a step trains on is the same on any number of ranks."""

    def rows(world_size: int) -> list[list[int]]:
        return [
            [row for share in shares for row in share.rows[: share.counted].tolist()]
            for shares in deal(datasets["parquet"], {**order, "world_size": world_size})
        ]

    assert rows(order["world_size"]) == rows(1)


def model_of(dataset: Dataset, rows: int) -> ModelSpec:
    return build_spec(list(reversed(dataset.feature_names)), dense=(dataset.num_dense,), rows=rows)


@settings(max_examples=20)
@given(order=orders)
def test_adapted_shares_are_adapted_batches(
    datasets: dict[str, Dataset], order: dict[str, Any]
) -> None:
    """The model has the features in another order than the data."""
    dataset = datasets["parquet"]
    spec = model_of(dataset, 100)
    batches = dataset.batches(order["batch_size"], shuffle_seed=order["shuffle_seed"])
    wanted = list(adapt_batches(dataset, spec, batches))
    ranks = [
        adapt_shares(
            dataset,
            spec,
            deal_batches(
                dataset,
                order["batch_size"],
                rank=rank,
                world_size=order["world_size"],
                shuffle_seed=order["shuffle_seed"],
            ),
        )
        for rank in range(order["world_size"])
    ]
    for shares, batch in zip(zip(*ranks, strict=True), wanted, strict=True):
        counted = [take_rows(s.batch, slice(0, s.counted)) for s in shares if s.counted]
        joined = join_batches(counted)
        assert joined.feature_names == spec.feature_names
        assert_same_rows(joined, batch)


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_id_out_of_range_is_told_with_its_row_in_the_data(
    datasets: dict[str, Dataset], seed: int | None, world_size: int
) -> None:
    """Row 10 has id 10: ranks that are dealt it say so, and when it comes."""
    dataset = datasets["parquet"]
    spec = model_of(dataset, 10)
    messages = []
    for rank in range(world_size):
        shares = deal_batches(
            dataset, 4, rank=rank, world_size=world_size, shuffle_seed=seed, start_batch=0
        )
        try:
            for share in adapt_shares(dataset, spec, shares):
                assert 10 not in share.rows
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all("row 10 (from 0): id 10, but table" in message for message in messages)


def test_data_that_do_not_fit_are_refused_at_once(datasets: dict[str, Dataset]) -> None:
    dataset = datasets["probe-npz"]
    spec = build_spec(["user", "item", "shop"], dense=(dataset.num_dense,), rows=100)
    shares = deal_batches(dataset, 4, rank=0, world_size=2)
    with pytest.raises(DataError, match="lacks 3 of the model's 3 features"):
        adapt_shares(dataset, spec, shares)


def test_a_rank_reads_only_blocks_that_hold_its_rows(datasets: dict[str, Dataset]) -> None:
    """Eleven rows in blocks of 4, 2, 4 and 1; batches that are skipped are not read."""
    dataset = datasets["parquet"]
    source, read = dataset.source, []

    class Watched:
        block_sizes = source.block_sizes
        keeps_block_order = source.keeps_block_order

        def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
            read.extend(blocks)
            return source.read_blocks(blocks)

    watched = dataclasses.replace(dataset, source=Watched())
    assert Watched.block_sizes == (4, 2, 4, 1)
    shares = list(deal_batches(watched, 4, rank=1, world_size=2, start_batch=1))
    assert [share.rows.tolist() for share in shares] == [[6, 7], [10, 10]]
    assert [share.counted for share in shares] == [2, 1]
    assert read == [2, 3]
