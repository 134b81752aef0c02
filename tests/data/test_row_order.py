"""Order, shards and resumption hold for every format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.data import Dataset
from dmt_convert.data.batch import join_batches, take_rows
from dmt_convert.data.dataset import RowBatches
from dmt_convert.errors import ConfigError
from support.data_files import BLOCK_VARIANTS, assert_same_rows

orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 13),
        "shuffle_seed": st.none() | st.integers(0, 50),
        "world_size": st.integers(1, 13),
    }
)


@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=orders)
def test_ranks_share_all_rows(
    datasets: dict[str, Dataset], variant: str, order: dict[str, int]
) -> None:
    dataset = datasets[variant]
    (whole,) = dataset.batches(dataset.num_rows)
    numbers: list[int] = []
    sizes = []
    for rank in range(order["world_size"]):
        batches = dataset.batches(**order, rank=rank)
        assert isinstance(batches, RowBatches)
        count = 0
        for batch in batches:
            assert_same_rows(batch, take_rows(whole, batches.rows))
            numbers += batches.rows.tolist()
            count += batch.num_rows
        sizes.append(count)
    assert sorted(numbers) == list(range(dataset.num_rows))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=orders, start=st.integers(0, 12), limit=st.none() | st.integers(0, 12), data=st.data())
def test_resumption_continues(
    datasets: dict[str, Dataset],
    variant: str,
    order: dict[str, int],
    start: int,
    limit: int | None,
    data: st.DataObject,
) -> None:
    dataset = datasets[variant]
    rank = data.draw(st.integers(0, order["world_size"] - 1))
    through = list(dataset.batches(**order, rank=rank))
    resumed = list(dataset.batches(**order, rank=rank, start_row=start, max_rows=limit))
    count = sum(batch.num_rows for batch in through)
    last = count if limit is None else min(count, start + limit)
    if start >= last:
        assert resumed == []
        return
    expected = take_rows(join_batches(through), slice(start, last))
    assert_same_rows(join_batches(resumed), expected)
    assert all(batch.num_rows == order["batch_size"] for batch in resumed[:-1])


@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_shuffle_depends_on_its_seed_alone(datasets: dict[str, Dataset], variant: str) -> None:
    def rows(seed: int | None, batch_size: int) -> list[int]:
        batches = datasets[variant].batches(batch_size, shuffle_seed=seed)
        assert isinstance(batches, RowBatches)
        return [row for _ in batches for row in batches.rows.tolist()]

    assert rows(None, 2) == list(range(11))
    assert rows(7, 2) == rows(7, 5)
    assert len({tuple(rows(seed, 3)) for seed in range(5)}) == 5


def test_blocks_are_shuffled_too(datasets: dict[str, Dataset]) -> None:
    def firsts(variant: str) -> set[int]:
        blocks = set()
        for seed in range(12):
            batches = datasets[variant].batches(1, shuffle_seed=seed)
            assert isinstance(batches, RowBatches)
            next(batches)
            blocks.add(int(batches.rows[0]) // 3)
        return blocks

    assert len(firsts("criteo-tsv")) > 1
    # Gzip is read forward: rows move inside their block only.
    assert firsts("criteo-tsv gzip") == {0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"start_row": -1},
        {"max_rows": -1},
        {"shuffle_seed": -1},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"world_size": 0},
    ],
)
def test_wrong_arguments_are_refused(datasets: dict[str, Dataset], wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        datasets["probe-npz"].batches(**{"batch_size": 1, **wrong})
