"""Every reader gives what its format's trainer feeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import READERS, Batch, Dataset, criteo_readers, open_data
from dmt_convert.data.stored_arrays import open_npz
from support.data_files import WRITERS

SHARED = Path(__file__).parents[2] / ".." / "shared"
VARIANTS = (
    "repository-npz",
    "dlrm-npz",
    "probe-npz",
    "criteo-npy",
    "criteo-npy multi-hot",
    "criteo-tsv",
    "criteo-tsv gzip",
    "parquet",
)


def read_all(dataset: Dataset, batch_size: int = 1000) -> Batch:
    (batch,) = dataset.batches(batch_size)
    return batch


def bag_lists(batch: Batch, feature: int) -> list[list[int]]:
    bag = batch.bags[feature]
    return [part.tolist() for part in np.split(bag.values, bag.offsets[1:-1])]


def test_every_reader_has_a_sample() -> None:
    assert tuple(WRITERS) == VARIANTS
    assert {name.split()[0] for name in WRITERS} == {reader.format for reader in READERS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sample_is_known_to_one_reader(tmp_path: Path, variant: str) -> None:
    path = WRITERS[variant](tmp_path)
    able = [reader.format for reader in READERS if reader.can_read(path)]
    assert able == [variant.split()[0]]
    dataset = open_data(path)
    assert dataset.format == able[0]
    assert dataset.path == path
    assert dataset.num_rows == 11


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_are_well_formed(tmp_path: Path, variant: str) -> None:
    dataset = open_data(WRITERS[variant](tmp_path))
    batches = list(dataset.batches(4))
    assert [batch.num_rows for batch in batches] == [4, 4, 3]
    for batch in batches:
        assert batch.dense.shape == (batch.num_rows, dataset.num_dense)
        assert batch.dense.dtype == np.float32
        assert batch.feature_names == dataset.feature_names
        assert (batch.labels is not None) == dataset.has_labels
        assert (batch.logits is not None) == dataset.has_logits
        if batch.labels is not None:
            assert batch.labels.dtype == np.float32
        for bag in batch.bags:
            assert bag.values.dtype == bag.offsets.dtype == np.int64
            assert bag.offsets.shape == (batch.num_rows + 1,)
            assert bag.offsets[0] == 0
            assert bag.offsets[-1] == len(bag.values)


def test_repository_npz(tmp_path: Path) -> None:
    path = WRITERS["repository-npz"](tmp_path)
    dataset = open_data(path)
    assert dataset.feature_names == ("user", "item")
    assert not dataset.names_are_positional
    batch = read_all(dataset)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(batch.dense, arrays["dense"])
        np.testing.assert_array_equal(batch.bags[1].values, arrays["sparse"][:, 1])
        np.testing.assert_array_equal(batch.labels, arrays["label"])


def test_repository_npz_without_schema_has_positional_names(tmp_path: Path) -> None:
    path = WRITERS["repository-npz"](tmp_path)
    (tmp_path / "schema.json").unlink()
    dataset = open_data(path)
    assert dataset.feature_names == ("f0", "f1")
    assert dataset.names_are_positional


def test_dlrm_npz_feeds_log1p_of_clipped_integers(tmp_path: Path) -> None:
    path = tmp_path / "kaggle_processed.npz"
    raw = np.array([[0, -1, 7], [-5, 1, 2]], dtype=np.int32)
    np.savez(path, X_int=raw, X_cat=np.array([[3.0], [4.0]]), y=np.array([1, 0]), counts=[9])
    batch = read_all(open_data(path))
    expected = np.log(np.float32([[1, 1, 8], [1, 2, 3]]))
    np.testing.assert_array_equal(batch.dense, expected)
    assert batch.bags[0].values.tolist() == [3, 4]


def test_probe_npz(tmp_path: Path) -> None:
    dataset = open_data(WRITERS["probe-npz"](tmp_path))
    assert dataset.has_logits and not dataset.has_labels
    batch = read_all(dataset)
    assert bag_lists(batch, 0)[:4] == [[], [0], [1, 2], []]
    assert batch.bags[0].weights is not None
    assert batch.bags[1].weights is None
    (_, second) = dataset.batches(6)
    np.testing.assert_array_equal(
        np.asarray(second.bags[0].weights), np.asarray(batch.bags[0].weights)[-4:]
    )


def test_probe_npz_without_dense(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", feature_names=["0"], values_0=np.arange(3), offsets_0=np.arange(4))
    dataset = open_data(tmp_path / "p.npz")
    assert dataset.num_dense == 0
    assert dataset.names_are_positional
    assert read_all(dataset).dense.shape == (3, 0)


def test_criteo_npy_joins_days_in_natural_order(tmp_path: Path) -> None:
    folder = WRITERS["criteo-npy"](tmp_path)
    dataset = open_data(folder)
    assert dataset.feature_names[:2] == ("cat_0", "cat_1")
    assert dataset.hash_ids and dataset.names_are_positional
    batch = read_all(dataset)
    assert batch.bags[25].values.tolist() == list(range(11))
    assert batch.dense[:, 12].tolist() == list(range(11))
    assert batch.labels is not None
    assert batch.labels.tolist() == [row % 2 for row in range(11)]
    assert open_data(folder / "day_10_labels.npy").num_rows == 7


def test_criteo_npy_keeps_wrapped_hashes_for_the_modulo(tmp_path: Path) -> None:
    np.save(tmp_path / "a_dense.npy", np.zeros((1, 13), dtype=np.float32))
    np.save(tmp_path / "a_sparse.npy", np.full((1, 26), -7, dtype=np.int32))
    dataset = open_data(tmp_path)
    assert not dataset.has_labels
    assert read_all(dataset).bags[0].values.tolist() == [-7]


def test_criteo_multi_hot(tmp_path: Path) -> None:
    batch = read_all(open_data(WRITERS["criteo-npy multi-hot"](tmp_path)))
    assert bag_lists(batch, 2)[1] == [3, 4, 5]
    assert batch.feature_names == ("cat_0", "cat_1", "cat_2")


@pytest.mark.parametrize("variant", ["criteo-tsv", "criteo-tsv gzip"])
def test_criteo_tsv(tmp_path: Path, variant: str) -> None:
    dataset = open_data(WRITERS[variant](tmp_path))
    assert dataset.hash_ids and dataset.has_labels
    batch = read_all(dataset)
    # Row r holds r - 3 first: -3 counts as -2, so log(x + 3) begins 0, 0, log 2.
    np.testing.assert_allclose(batch.dense[:4, 0], np.log([1, 1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(batch.dense[:, 1], np.log(3), rtol=1e-6)
    assert batch.bags[0].values.tolist() == list(range(11))
    assert set(batch.bags[1].values.tolist()) == {0}
    assert set(batch.bags[2].values.tolist()) == {2**32 - 1}


def test_criteo_tsv_with_the_dlrm_transform(tmp_path: Path) -> None:
    path = WRITERS["criteo-tsv"](tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps({"dense_transform": "log1p"}))
    batch = read_all(open_data(path))
    np.testing.assert_allclose(batch.dense[:6, 0], np.log([1, 1, 1, 1, 2, 3]), rtol=1e-6)


def test_criteo_tsv_without_labels(tmp_path: Path) -> None:
    path = WRITERS["criteo-tsv"](tmp_path)
    lines = [line.split(b"\t", 1)[1] for line in path.read_bytes().splitlines()]
    path.write_bytes(b"\r\n".join(lines))
    dataset = open_data(path)
    assert dataset.num_rows == 11
    assert not dataset.has_labels
    assert read_all(dataset).bags[0].values.tolist() == list(range(11))


@pytest.mark.parametrize("num_blocks_rows", [1, 3, 4, 11, 12])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_criteo_tsv_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_blocks_rows: int, chunk: int
) -> None:
    monkeypatch.setattr(criteo_readers, "BLOCK_ROWS", num_blocks_rows)
    monkeypatch.setattr(criteo_readers, "_CHUNK_BYTES", chunk)
    for variant in ("criteo-tsv", "criteo-tsv gzip"):
        dataset = open_data(WRITERS[variant](tmp_path))
        assert dataset.num_rows == 11
        ids = [i for batch in dataset.batches(2) for i in batch.bags[0].values.tolist()]
        assert ids == list(range(11))
        shuffled = [
            i for batch in dataset.batches(2, shuffle_seed=1) for i in batch.bags[0].values.tolist()
        ]
        assert sorted(shuffled) == list(range(11))


def test_parquet(tmp_path: Path) -> None:
    dataset = open_data(WRITERS["parquet"](tmp_path))
    assert dataset.feature_names == ("user", "seen")
    assert not dataset.names_are_positional
    batch = read_all(dataset)
    # Dense inputs are those of the schema, and no others.
    np.testing.assert_array_equal(batch.dense, [[row] for row in range(11)])
    assert bag_lists(batch, 0)[:3] == [[0], [], [2]]
    assert bag_lists(batch, 1)[:6] == [[], [1], [2, 2], [], [4], [5, 5]]
    assert batch.bags[1].weights is not None
    assert set(batch.bags[1].weights.tolist()) == {0.5}
    assert batch.labels is not None
    assert batch.labels.tolist() == [row % 2 for row in range(11)]


def test_parquet_with_fixed_and_large_lists(tmp_path: Path) -> None:
    table = pa.table(
        {
            "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
            "large": pa.array([[5], []], pa.large_list(pa.int32())),
            "unsigned": pa.array([6, 7], pa.uint64()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    batch = read_all(open_data(tmp_path / "a.parquet"))
    assert [bag_lists(batch, f) for f in range(3)] == [
        [[1, 2], [3, 4]],
        [[5], []],
        [[6], [7]],
    ]
    assert batch.dense.shape == (2, 0)
    assert batch.labels is None


def test_stored_npz_is_memory_mapped(tmp_path: Path) -> None:
    values = np.asfortranarray(np.arange(12).reshape(3, 4))
    np.savez(tmp_path / "stored.npz", a=values, empty=np.zeros((3, 0)))
    arrays = open_npz(tmp_path / "stored.npz")
    assert isinstance(arrays["a"].read(), np.memmap)
    np.testing.assert_array_equal(arrays["a"].read(), values)
    assert arrays["empty"].read().shape == (3, 0)


def test_reading_data_needs_no_torch_and_no_pyarrow() -> None:
    code = (
        "import sys, dmt_convert.data; "
        "print([m for m in ('torch', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("folder", "num_dense", "num_features"), [("criteo100k", 13, 26), ("movielens1m", 0, 14)]
)
def test_real_repository_npz(folder: str, num_dense: int, num_features: int) -> None:
    path = SHARED / "data" / folder / "test.npz"
    if not path.exists():
        pytest.skip(f"{folder} is not here (its licence forbids shipping it)")
    dataset = open_data(path)
    assert (dataset.num_dense, len(dataset.feature_names)) == (num_dense, num_features)
    rows = sum(batch.num_rows for batch in dataset.batches(8192, shuffle_seed=0))
    with np.load(path) as arrays:
        assert rows == len(arrays["label"])


def test_real_probes() -> None:
    probes = sorted((SHARED / "checkpoints").glob("*/probe.npz"))
    if not probes:
        pytest.skip("no probes of real checkpoints here")
    for probe in probes:
        dataset = open_data(probe)
        assert dataset.format == "probe-npz"
        assert read_all(dataset).logits is not None, probe
