"""Which files of a folder count, and what a folder is if they do not."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import open_data
from dmt_convert.errors import DataError


def write(path: Path, rows: int = 2, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"f": [*range(rows)], "x": [0.5] * rows}), path)
    return path


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        open_data(path)
    return caught.value


@pytest.mark.parametrize("name", ["._a.parquet", "_part.parquet", ".part-1.parquet"])
@pytest.mark.parametrize("content", [b"PAR1 half a file", b""])
def test_hidden_files_are_skipped(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / name).write_bytes(content)
    assert open_data(tmp_path).num_rows == 2
    write(tmp_path / name)
    assert open_data(tmp_path).num_rows == 2
    write(tmp_path / "_temporary" / "0" / "b.parquet")
    assert open_data(tmp_path).num_rows == 2


def test_files_of_other_names_are_not_left_out(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.pq", "c.PARQUET", "d.parquet.snappy", "part-00000"):
        write(tmp_path / name)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "README").write_text("rows")
    assert open_data(tmp_path).num_rows == 10


@pytest.mark.parametrize(
    ("marker", "table"),
    [
        ("_delta_log/00000000000000000000.json", "Delta Lake"),
        ("metadata/00000-1.metadata.json", "Apache Iceberg"),
        (".hoodie/hoodie.properties", "Apache Hudi"),
        ("_spark_metadata/0", "Spark's streaming sink"),
    ],
)
@pytest.mark.parametrize("inside", ["", "dt=2024-01-01", "dt=2024-01-01/hour=3"])
def test_tables_with_a_log_are_named(tmp_path: Path, marker: str, table: str, inside: str) -> None:
    write(tmp_path / inside / "part-0.parquet")
    (tmp_path / marker).parent.mkdir(exist_ok=True)
    (tmp_path / marker).write_text("{}")
    error = refusal(tmp_path / inside)
    assert f"a table of {table}" in error.found
    assert str(tmp_path) in error.hint
    assert "parquet" in error.hint


def test_a_table_without_files_of_its_own_is_named(tmp_path: Path) -> None:
    write(tmp_path / "data" / "part-0.parquet")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "v1.metadata.json").write_text("{}")
    assert "Apache Iceberg" in refusal(tmp_path).found


def test_partitions_are_named(tmp_path: Path) -> None:
    for day in ("dt=2024-01-01", "dt=2024-01-02"):
        write(tmp_path / day / "part-0.parquet")
    error = refusal(tmp_path)
    assert "partitions (hive folders): dt=2024-01-01, dt=2024-01-02" in error.found
    assert str(tmp_path / "dt=2024-01-01") in error.hint
    assert open_data(tmp_path / "dt=2024-01-01").num_rows == 2
    deeper = tmp_path / "deeper"
    write(deeper / "y=1" / "m=2" / "part-0.parquet")
    assert "partitions (hive folders): y=1" in refusal(deeper).found


def test_folders_that_writers_make_are_named(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.parquet" / "part-0.parquet")
    error = refusal(tmp_path)
    assert "folders of parquet files: train.parquet, valid.parquet" in error.found
    assert str(tmp_path / "train.parquet") in error.hint
    assert open_data(tmp_path / "train.parquet").num_rows == 2


def test_a_folder_beside_files_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "later" / "b.parquet")
    assert "beside 1 parquet file" in refusal(tmp_path).found


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 64, limits[1]))
    yield held + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_files_than_a_process_may_open(tmp_path: Path, few_descriptors: int) -> None:
    first = write(tmp_path / "part-0.parquet").read_bytes()
    for i in range(1, 2 * few_descriptors):
        (tmp_path / f"part-{i}.parquet").write_bytes(first)
    dataset = open_data(tmp_path)
    assert dataset.num_rows == 4 * few_descriptors
    assert sum(batch.num_rows for batch in dataset.batches(7, shuffle_seed=1)) == dataset.num_rows


def test_files_may_order_their_columns_differently(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", f=[1], g=[2], x=[0.5], y=[0.25])
    write(tmp_path / "b.parquet", y=[0.25], g=[2], note=["z"], x=[0.5], f=[1])
    (batch,) = open_data(tmp_path).batches(2)
    assert [bag.values.tolist() for bag in batch.bags] == [[1, 1], [2, 2]]
    assert batch.dense.tolist() == [[0.5, 0.25]] * 2


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"f": [1], "x": [0.5], "h": [1]}, "h: missing in a.parquet, int64 in b.parquet"),
        ({"f": [1.0], "x": [0.5]}, "f: int64 in a.parquet, double in b.parquet"),
        ({"f": pa.nulls(1), "x": [0.5]}, "f: int64 in a.parquet, null in b.parquet"),
        ({"f": [1]}, "x: double in a.parquet, missing in b.parquet"),
    ],
)
def test_columns_that_differ_between_files_are_named(
    tmp_path: Path, columns: dict[str, object], found: str
) -> None:
    write(tmp_path / "a.parquet", f=[1], x=[0.5], ids=[1])
    write(tmp_path / "b.parquet", ids=[1], **columns)
    error = refusal(tmp_path)
    assert "hold different columns" in error.found
    assert found in error.found + "".join(error.details)


@pytest.mark.parametrize("start", [2**53 + 1, 1_700_000_000_000_000_001, 2**63])
def test_integers_that_doubles_cannot_hold(tmp_path: Path, start: int) -> None:
    values = np.arange(2, dtype=np.uint64) + np.uint64(start)
    write(tmp_path / "a.parquet", f=[1, 2], t=pa.array(values), label=[0, 1])
    (tmp_path / "schema.json").write_text('{"dense_features": ["t"]}')
    (batch,) = open_data(tmp_path).batches(2)
    np.testing.assert_array_equal(batch.dense[:, 0], values.astype(np.float32))
    write(tmp_path / "a.parquet", f=[1, 2], t=pa.array(values), label=pa.array(values))
    with pytest.raises(DataError, match=r"row 0 \(from 0\): label"):
        list(open_data(tmp_path).batches(2))


def test_columns_that_feed_nothing_are_not_read(tmp_path: Path) -> None:
    from dmt_convert.data import match_inputs
    from support.specs import build_spec

    path = write(tmp_path / "a.parquet", f0=[1, 2], delta=[-1, -2], x=[0.5, float("nan")])
    (tmp_path / "schema.json").write_text('{"dense_features": []}')
    dataset = match_inputs(open_data(path), build_spec(["f0"], dense=(1,)))
    (batch,) = dataset.batches(2)  # a negative number and a NaN elsewhere are none of its business
    assert batch.dense.tolist() == [[1.0], [1.0]]
    assert batch.bags[0].values.tolist() == [1, 2]


def test_sets_of_npy_files_that_are_not_whole_are_not_left_out(tmp_path: Path) -> None:
    for day in (0, 1):
        np.save(tmp_path / f"day_{day}_dense.npy", np.zeros((2, 13), np.float32))
        np.save(tmp_path / f"day_{day}_sparse.npy", np.zeros((2, 26), np.int32))
    assert open_data(tmp_path).num_rows == 4
    (tmp_path / "day_1_sparse.npy").unlink()
    error = refusal(tmp_path)
    assert "1 sets of files are not whole" in error.found
    assert "day_1_dense.npy" in error.details[0]
