"""benchmarks/data_sets: raw files become splits, and unknown files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_sets import DATA_SETS, DataSet, RawDataError, prepare
from benchmarks.data_sets.frappe import NEGATIVES
from benchmarks.data_sets.prepared import split_rows
from dmt_convert.data import open_data

FILMS = "|".join(["{}", "A Film (1995)", "01-Jan-1995", "", "", *"0100010000000000000"])


def zipped(**files: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"Mobile_Frappe/frappe/{name}.csv", text)
    return target.getvalue()


def frappe_files() -> dict[str, bytes]:
    log = ["user", "item", "cnt", "daytime", "weekday", "isweekend", "homework", "cost"]
    log += ["weather", "country", "city"]
    about = "item package category downloads developer icon language description name price rating"
    logs = [
        [user, user % 40, 1, "noon", "friday", "workday", "home", "free", "sunny", "Spain", 0]
        for user in range(100)
    ]
    apps = [[item, *"abcdefgh", "Free", "4.4"] for item in range(39)]
    tables = {"frappe": [log, *logs], "meta": [about.split(), *apps]}
    texts = {n: "\n".join("\t".join(map(str, row)) for row in t) for n, t in tables.items()}
    return {"Mobile_Frappe.zip": zipped(**texts)}


def access_files() -> dict[str, bytes]:
    rows = ["ACTION,RESOURCE,MGR_ID", *(f"{n % 3 > 0:d},{n},{n % 7}" for n in range(100))]
    return {"train.csv": "\n".join(rows).encode()}


def movielens_files() -> dict[str, bytes]:
    texts = {
        "u.data": "\n".join(f"{n % 9}\t{n % 8}\t{n % 5 + 1}\t88125{n:04}" for n in range(100)),
        "u.user": "\n".join(f"{n}|2{n}|F|writer|0123{n}" for n in range(9)),
        "u.item": "\n".join(FILMS.format(n) for n in range(8)),
    }
    return {name: text.encode() for name, text in texts.items()}


FILES = {
    "frappe": frappe_files(),
    "amazon_access": access_files(),
    "movielens100k": movielens_files(),
}


def write_raw(data_set: DataSet, contents: Mapping[str, bytes], folder: Path) -> DataSet:
    """Write raw files, and return the data set that expects these."""
    files = []
    for file in data_set.files:
        content = contents[file.name]
        (folder / file.name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(dataclasses.replace(file, size=len(content), sha256=digest))
    return dataclasses.replace(data_set, files=tuple(files))


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_splits_hold_every_row_once(name: str, tmp_path: Path) -> None:
    known = write_raw(DATA_SETS[name], FILES[name], tmp_path)
    schema = prepare(known, tmp_path, tmp_path / "out")
    splits = [open_data(tmp_path / "out" / f"{split}.npz") for split in ("train", "valid", "test")]
    per_row = 1 + NEGATIVES if name == "frappe" else 1
    assert [split.num_rows for split in splits] == [70 * per_row, 10 * per_row, 20 * per_row]
    names = [feature["name"] for feature in schema["sparse_features"]]
    assert all(split.feature_names == tuple(names) for split in splits)


def test_frappe_draws_apps_that_the_user_never_opened(tmp_path: Path) -> None:
    known = write_raw(DATA_SETS["frappe"], FILES["frappe"], tmp_path)
    examples = known.read({file.name: file.read(tmp_path) for file in known.files})
    rows = list(zip(examples.columns["user"], examples.columns["item"], strict=True))
    opened = {row for row, label in zip(rows, examples.labels, strict=True) if label}
    drawn = [row for row, label in zip(rows, examples.labels, strict=True) if not label]
    assert len(drawn) == NEGATIVES * len(opened)
    assert not opened & set(drawn)
    # App 39 is not described; the others are free and have 4.4 stars.
    assert set(examples.columns["rating"]) == {"4.5", "unknown"}


def test_groups_stay_together() -> None:
    groups = np.repeat(np.arange(50), 3)
    parts = [set(groups[rows]) for rows in split_rows(150, groups).values()]
    assert sum(map(len, parts)) == 50


def test_another_file_is_refused(tmp_path: Path) -> None:
    known = write_raw(DATA_SETS["amazon_access"], FILES["amazon_access"], tmp_path)
    (tmp_path / "train.csv").write_bytes(FILES["amazon_access"]["train.csv"][:-1])
    with pytest.raises(RawDataError, match="SHA-256"):
        prepare(known, tmp_path, tmp_path / "out")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(RawDataError, match=r"missing; take Data/train\.csv of github\.com"):
        prepare(known, tmp_path, tmp_path / "out")
