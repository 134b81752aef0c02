"""A range of rows: the same rows whatever the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import Dataset, open_data, take_range

ROWS = 20


@pytest.fixture(params=["parquet", "npz"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Rows whose one dense input is their number, in several blocks where the format has any."""
    numbers = np.arange(ROWS, dtype=np.float32)
    path = tmp_path / f"rows.{request.param}"
    if request.param == "npz":
        np.savez(path, dense=numbers[:, None], sparse=np.zeros((ROWS, 1), dtype=np.int32))
    else:
        columns = {"x": numbers, "f": np.zeros(ROWS, dtype=np.int64), "label": numbers % 2}
        pq.write_table(pa.table(columns), path, row_group_size=6)
    return open_data(path)


def numbers(dataset: Dataset, **options: int) -> list[int]:
    batches = dataset.batches(4, **options)
    return [int(x) for batch in batches for x in batch.dense[:, 0]]


@pytest.mark.parametrize(
    ("first", "last"), [(0, ROWS), (0, 7), (7, 13), (5, 6), (13, ROWS), (3, 3)]
)
def test_the_rows_are_those_asked_for(dataset: Dataset, first: int, last: int) -> None:
    part = take_range(dataset, first, last)
    assert part.num_rows == last - first
    assert numbers(part) == list(range(first, last))
    shuffled = numbers(part, shuffle_seed=1)
    assert sorted(shuffled) == list(range(first, last))
    assert last - first < 7 or shuffled != numbers(part)
    ranks = [numbers(part, shuffle_seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] + ranks[1] == shuffled


def test_a_range_of_a_range(dataset: Dataset) -> None:
    assert numbers(take_range(take_range(dataset, 4, 16), 3, 9)) == list(range(7, 13))
