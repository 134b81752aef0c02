"""Digests of rows: other rows have another digest, the same rows the same, however they lie."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmt_convert.data import open_data, take_range
from dmt_convert.training import digest_rows, digest_share, join_digests, row_digest
from support.rows import write_clicks
from support.specs import CLICK_NAMES

COUNT = 400
Edit = Callable[[dict[str, Any]], object]


def edit_npz(path: Path, edit: Edit) -> Path:
    arrays = dict(np.load(path))
    edit(arrays)
    np.savez(path, **arrays)
    return path


def put(name: str, place: Any, value: float) -> Edit:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][place] = value

    return change


def swap_rows(arrays: dict[str, Any]) -> None:
    for array in arrays.values():
        array[[17, 300]] = array[[300, 17]]


EDITS: dict[str, Edit] = {
    "a label": lambda arrays: arrays["label"].__setitem__(211, 1 - arrays["label"][211]),
    "all labels": lambda arrays: arrays.update(label=1 - arrays["label"]),
    "an id": lambda arrays: arrays["sparse"].__setitem__((3, 1), 1 + arrays["sparse"][3, 1]),
    "a dense input": put("dense", (399, 4), 0.25),
    "the order of two rows": swap_rows,
    "a row less": lambda arrays: arrays.update({k: v[:-1] for k, v in arrays.items()}),
}


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return write_clicks(tmp_path / "rows", "train", COUNT, seed=3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 4 runs of 10 rows are read of what has more than 40."""
    monkeypatch.setattr(row_digest, "RUN_ROWS", 10)
    monkeypatch.setattr(row_digest, "RUNS", 4)


def digest(path: Path) -> str:
    return digest_rows(open_data(path))


@pytest.mark.parametrize("edit", EDITS)
def test_other_rows_have_another_digest(npz: Path, edit: str) -> None:
    before = digest(npz)
    edit_npz(npz, lambda arrays: None)
    assert digest(npz) == before
    assert digest(edit_npz(npz, EDITS[edit])) != before


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.usefixtures("few")
def test_every_byte_of_a_large_npz_counts(npz: Path, edit: str) -> None:
    """By the CRC-32 of its arrays: most rows are not read."""
    before = digest(npz)
    assert digest(edit_npz(npz, EDITS[edit])) != before


def write_parquet(path: Path, labels: Any) -> Path:
    rng = np.random.default_rng(0)
    columns = {f"c{i}": rng.integers(0, 9, len(labels)) for i in range(3)} | {"label": labels}
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


@pytest.mark.usefixtures("few")
def test_statistics_of_parquet_count(tmp_path: Path) -> None:
    """Row 150 is in no run that is read; its column chunk gets another maximum."""
    labels = np.zeros(COUNT, dtype=np.int64)
    labels[::7] = 1
    labels[100:200] = 0
    before = digest(write_parquet(tmp_path / "a.parquet", labels))
    assert digest(write_parquet(tmp_path / "b.parquet", labels)) == before
    labels[150] = 1
    assert digest(write_parquet(tmp_path / "c.parquet", labels)) != before


def criteo_line(row: int, label: int) -> str:
    return "\t".join([str(label), *map(str, range(row, row + 13)), *["1f"] * 26]) + "\n"


@pytest.mark.usefixtures("few")
def test_gzip_is_read_forward_and_its_checksum_counts(tmp_path: Path) -> None:
    digests = set()
    for changed in (None, 5, 333):
        lines = "".join(criteo_line(100 + row, int(row == changed)) for row in range(COUNT))
        path = tmp_path / f"{changed}.tsv.gz"
        with gzip.GzipFile(path, "wb", mtime=0) as file:
            file.write(lines.encode())
        digests.add(digest(path))
    assert len(digests) == 3


@pytest.mark.usefixtures("few")
def test_rows_of_plain_text_that_are_read_count(tmp_path: Path) -> None:
    digests = set()
    for changed in (None, 0, 135, 399):
        path = tmp_path / f"{changed}.tsv"
        lines = "".join(criteo_line(100 + row, int(row == changed)) for row in range(COUNT))
        path.write_text(lines)
        digests.add(digest(path))
    assert len(digests) == 4


def test_names_and_times_of_files_do_not_count(npz: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(npz.parent, tmp_path / "moved")) / "other.npz"
    (tmp_path / "moved" / "train.npz").rename(moved)
    assert digest(moved) == digest(npz)


def test_small_data_may_be_stored_otherwise(npz: Path) -> None:
    before = digest(npz)
    np.savez_compressed(npz, **dict(np.load(npz)))
    assert digest(npz) == before


def test_the_names_of_inputs_count(npz: Path) -> None:
    before = digest(npz)
    schema = npz.with_name("schema.json")
    schema.write_text(schema.read_text().replace(CLICK_NAMES[0], "another"))
    assert digest(npz) != before


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_processes_share_the_work(npz: Path, parts: int) -> None:
    rows = open_data(npz)
    runs = {}
    for part in range(parts):
        runs |= digest_share(rows, part, parts)
    assert join_digests(rows, runs) == digest_rows(rows)


def test_ranges_of_one_data_set_differ(npz: Path) -> None:
    rows = open_data(npz)
    first, second = take_range(rows, 0, 200), take_range(rows, 200, 400)
    assert digest_rows(first) != digest_rows(second)
    assert first.files == (npz,)
