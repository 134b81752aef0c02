"""From raw files to training, validation and test rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SPLITS: Final[Mapping[str, float]] = {"train": 0.7, "valid": 0.1, "test": 0.2}
"""Split -> its share of the rows."""
SEED: Final = 20150512
"""Of every random choice here, so that everybody measures on the same rows."""


class RawDataError(Exception):
    """A raw file is missing, or is not the file that the loader was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile:
    """A public file: where it lies, and what it must hold."""

    name: str
    project: str
    """Public GitHub project, as owner/name."""
    path: str
    """Of the file in that project."""
    size: int
    sha256: str

    def read(self, folder: Path) -> bytes:
        """Read the file and check it.

        Raises:
            RawDataError: It is missing, or its size or digest differs.
        """
        path = folder / self.name
        origin = f"take {self.path} of github.com/{self.project}"
        if not path.is_file():
            raise RawDataError(f"{path} is missing; {origin}")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if (len(content), digest) != (self.size, self.sha256):
            raise RawDataError(
                f"{path} has {len(content)} bytes and SHA-256 {digest}, expected {self.size} "
                f"bytes and {self.sha256}; {origin}"
            )
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Labelled rows of raw values; rows of one group share a split."""

    columns: Mapping[str, Sequence[str]]
    """Feature -> its value in each row."""
    labels: Sequence[int]
    groups: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set, and how its raw files are read."""

    name: str
    about: str
    licence: str
    files: tuple[RawFile, ...]
    read: Callable[[Mapping[str, bytes]], Examples]
    """Content of the raw files by name -> rows."""

    def describe(self) -> str:
        lines = [f"{self.name}: {self.about}", f"  licence: {self.licence}"]
        for file in self.files:
            lines.append(f"  {file.name}: {file.path} of github.com/{file.project}")
            lines.append(f"    {file.size} bytes, SHA-256 {file.sha256}")
        return "\n".join(lines)


def prepare(data_set: DataSet, raw: Path, out: Path) -> dict[str, Any]:
    """Read and check the raw files, split the rows at random, and write the three splits.

    Ids are numbered by the order of their values; no id is left out for being rare.

    Returns:
        What `schema.json` says.
    """
    examples = data_set.read({file.name: file.read(raw) for file in data_set.files})
    labels = np.asarray(examples.labels, dtype=np.uint8)
    ids, features = [], []
    for name, values in examples.columns.items():
        known, column = np.unique(np.asarray(values), return_inverse=True)
        ids.append(column.astype(np.int32))
        features.append({"name": name, "cardinality": len(known)})
    sparse = np.stack(ids, axis=1)
    out.mkdir(parents=True, exist_ok=True)
    rows, positives = {}, {}
    for split, chosen in split_rows(len(labels), examples.groups).items():
        np.savez_compressed(
            out / f"{split}.npz",
            dense=np.zeros((len(chosen), 0), np.float32),
            sparse=sparse[chosen],
            label=labels[chosen],
        )
        rows[split] = len(chosen)
        positives[split] = round(float(labels[chosen].mean()), 6)
    schema = {
        "name": data_set.name,
        "label": "label (uint8, 1 = positive)",
        "dense_features": [],
        "sparse_features": features,
        "rows": rows,
        "positives": positives,
        "source": data_set.about,
        "licence": data_set.licence,
    }
    (out / "schema.json").write_text(json.dumps(schema, indent=1) + "\n")
    return schema


def split_rows(
    count: int, groups: npt.NDArray[np.int64] | None = None
) -> dict[str, npt.NDArray[np.int64]]:
    """Deal rows out at random, whole groups at a time; the rows of a split stay shuffled."""
    random = np.random.default_rng(SEED)
    groups = np.arange(count) if groups is None else groups
    _, group = np.unique(groups, return_inverse=True)
    place = random.permutation(group.max() + 1)[group] / (group.max() + 1)
    bounds = np.cumsum(list(SPLITS.values()))[:-1]
    split = np.searchsorted(bounds, place, side="right")
    order = random.permutation(count)
    return {name: order[split[order] == number] for number, name in enumerate(SPLITS)}
