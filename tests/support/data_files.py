"""Tiny data sets: one writer per reader and variant, of eleven rows each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmt_convert.data import Batch

NUM_ROWS = 11

Writer = Callable[[Path], Path]


def write_repository_npz(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "train.npz"
    np.savez_compressed(
        path,
        dense=rng.normal(size=(NUM_ROWS, 3)).astype(np.float32),
        sparse=rng.integers(0, 5, size=(NUM_ROWS, 2), dtype=np.int32),
        label=rng.integers(0, 2, size=NUM_ROWS, dtype=np.uint8),
    )
    schema = {
        "dense_features": ["I1", "I2", "I3"],
        "sparse_features": [{"name": "user", "cardinality": 5}, {"name": "item"}],
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    return path


def write_dlrm_npz(folder: Path) -> Path:
    path = folder / "day_processed.npz"
    ids = np.arange(NUM_ROWS)[:, None] + np.arange(26)
    raw = np.arange(NUM_ROWS)[:, None] * np.arange(13)
    np.savez(path, X_int=raw, X_cat=ids.astype(np.float64), y=np.arange(NUM_ROWS) % 2)
    return path


def write_probe_npz(folder: Path) -> Path:
    path = folder / "probe.npz"
    lengths = np.arange(NUM_ROWS) % 3
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.savez(
        path,
        dense=np.arange(NUM_ROWS * 2, dtype=np.float32).reshape(-1, 2),
        feature_names=np.array(["a", "b"]),
        values_0=np.arange(offsets[-1]),
        offsets_0=offsets,
        weights_0=np.linspace(0, 1, offsets[-1], dtype=np.float32),
        values_1=np.arange(NUM_ROWS),
        offsets_1=np.arange(NUM_ROWS + 1),
        logits=np.linspace(-1, 1, NUM_ROWS, dtype=np.float32),
        output=np.array([None, 1], dtype=object).astype(str),
    )
    return path


def write_criteo_npy(folder: Path) -> Path:
    folder = folder / "criteo"
    folder.mkdir()
    first = 0
    for day, size in ((2, 4), (10, NUM_ROWS - 4)):
        rows = np.arange(first, first + size)
        np.save(folder / f"day_{day}_dense.npy", np.tile(rows[:, None], 13).astype(np.float32))
        np.save(folder / f"day_{day}_sparse.npy", np.tile(rows[:, None], 26).astype(np.int32))
        np.save(folder / f"day_{day}_labels.npy", (rows % 2)[:, None].astype(np.int32))
        first += size
    return folder


def write_multi_hot(folder: Path) -> Path:
    ids = {str(f): np.arange(NUM_ROWS * (f + 1)).reshape(NUM_ROWS, -1) for f in range(3)}
    np.savez(folder / "day_0_sparse_multi_hot.npz", **ids)
    np.save(folder / "day_0_dense.npy", np.zeros((NUM_ROWS, 13), dtype=np.float32))
    np.save(folder / "day_0_labels.npy", np.zeros((NUM_ROWS, 1), dtype=np.int32))
    return folder / "day_0_sparse_multi_hot.npz"


def tsv_text(num_rows: int = NUM_ROWS) -> bytes:
    lines = []
    for row in range(num_rows):
        numbers = [str(row - 3), "", *(str(c) for c in range(11))]
        ids = [f"{row:08x}", "", "ffffffff", *(f"{c:x}" for c in range(23))]
        lines.append("\t".join([str(row % 2), *numbers, *ids]))
    return ("\n".join(lines) + "\n").encode()


def write_criteo_tsv(folder: Path) -> Path:
    path = folder / "day_0"
    path.write_bytes(tsv_text())
    return path


def write_criteo_tsv_gz(folder: Path) -> Path:
    path = folder / "day_0.gz"
    path.write_bytes(gzip.compress(tsv_text()))
    return path


def write_parquet(folder: Path) -> Path:
    folder = folder / "parts"
    folder.mkdir()
    first = 0
    for part, size in ((2, 6), (10, NUM_ROWS - 6)):
        rows = list(range(first, first + size))
        table = pa.table(
            {
                "label": pa.array([row % 2 == 1 for row in rows]),
                "price": pa.array([row / 2 for row in rows], pa.float64()),
                "age": pa.array(rows, pa.int16()),
                "user": pa.array([None if row == 1 else row for row in rows], pa.int32()),
                "seen": pa.array([None if row == 3 else [row] * (row % 3) for row in rows]),
                "seen__weights": pa.array(
                    [[0.5] * (0 if row == 3 else row % 3) for row in rows],
                    pa.list_(pa.float32()),
                ),
                "comment": pa.array([str(row) for row in rows]),
            }
        )
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=4)
        first += size
    (folder / "schema.json").write_text(json.dumps({"dense_features": ["age"]}))
    return folder


WRITERS: Mapping[str, Writer] = {
    "repository-npz": write_repository_npz,
    "dlrm-npz": write_dlrm_npz,
    "probe-npz": write_probe_npz,
    "criteo-npy": write_criteo_npy,
    "criteo-npy multi-hot": write_multi_hot,
    "criteo-tsv": write_criteo_tsv,
    "criteo-tsv gzip": write_criteo_tsv_gz,
    "parquet": write_parquet,
}


BLOCK_VARIANTS = (
    "repository-npz",
    "probe-npz",
    "criteo-npy",
    "criteo-npy multi-hot",
    "criteo-tsv",
    "criteo-tsv gzip",
    "parquet",
)
"""Those that are read in blocks of rows."""


def assert_same_rows(left: Batch, right: Batch) -> None:
    np.testing.assert_array_equal(left.dense, right.dense)
    np.testing.assert_equal(left.labels, right.labels)
    np.testing.assert_equal(left.logits, right.logits)
    for mine, theirs in zip(left.bags, right.bags, strict=True):
        np.testing.assert_array_equal(mine.values, theirs.values)
        np.testing.assert_array_equal(mine.offsets, theirs.offsets)
        np.testing.assert_equal(mine.weights, theirs.weights)
