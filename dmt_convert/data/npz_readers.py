"""Readers of npz files.

- `dlrm-npz`: the processed file of the facebookresearch DLRM trainer, `X_int`, `X_cat`, `y`. The
  trainer's preprocessing sets negative integers to 0 before it writes the file, and its collate
  function feeds log(X_int + 1) as float32 [facebookresearch/dlrm, `data_utils.py`,
  `dlrm_data_pytorch.py`]; both are applied here. It stores ids as float64 whole numbers.
- `repository-npz`: `dense` (n, D), `sparse` (n, F), `label` (n,); `dense` and `label` may be
  absent. A `schema.json` beside the file names the columns; without it names are positional.
- `probe-npz`: one batch as fed to the model, with its logits if they are known. Arrays: `dense`
  (B, D), `feature_names` (F,), `values_i` and `offsets_i` (B + 1,) for feature i, optionally
  `weights_i`, `logits` (B,). Other arrays are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.data.array_names import open_arrays
from dmt_convert.data.batch import Bag, Batch, take_rows
from dmt_convert.data.column_names import are_positional, check_unique
from dmt_convert.data.dataset import Dataset, TakeRows
from dmt_convert.data.stored_arrays import ArrayPart, StoredArray, npz_names, open_npz
from dmt_convert.data.value_checks import (
    RowPlace,
    check_dense,
    check_ids,
    check_offsets,
    check_weights,
)
from dmt_convert.errors import DataError

_DLRM_NAMES: Final = frozenset({"X_int", "X_cat", "y"})


def is_dlrm_npz(path: Path) -> bool:
    """Tell by the names of the arrays."""
    return path.is_file() and npz_names(path) >= _DLRM_NAMES


def read_dlrm_npz(path: Path) -> Dataset:
    """Open `*_processed.npz` or `*_reordered.npz` (one file), reading headers only.

    Raises:
        DataError: Arrays are damaged or do not fit each other.
    """
    arrays = open_npz(path)
    part = ArrayPart(
        dense=arrays["X_int"], ids=(arrays["X_cat"],), is_matrix=True, labels=arrays["y"]
    )
    return open_arrays(
        path,
        "dlrm-npz",
        (part,),
        dense_name="X_int[{}]",
        transform="log1p",
    )


def is_repository_npz(path: Path) -> bool:
    """Tell by the names of the arrays."""
    return path.is_file() and "sparse" in npz_names(path)


def read_repository_npz(path: Path) -> Dataset:
    """Open the file, reading headers only.

    Raises:
        DataError: Arrays are damaged, or do not fit each other or the schema.
    """
    arrays = open_npz(path)
    part = ArrayPart(
        dense=arrays.get("dense"),
        ids=(arrays["sparse"],),
        is_matrix=True,
        labels=arrays.get("label"),
    )
    return open_arrays(path, "repository-npz", (part,))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBlock:
    """A `BlockSource` of one block that is held in memory."""

    batch: Batch
    """All rows."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of the one block."""
        return (self.batch.num_rows,)

    @property
    def keeps_block_order(self) -> bool:
        """Memory can be read in any order."""
        return False

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Yield the one block, as often as asked."""
        for _ in blocks:
            yield partial(take_rows, self.batch)


def is_probe_npz(path: Path) -> bool:
    """Tell by the names of the arrays."""
    return path.is_file() and npz_names(path) >= {"feature_names", "values_0", "offsets_0"}


def read_probe_npz(path: Path) -> Dataset:
    """Read a probe whole, and check it: it is one batch.

    Raises:
        DataError: Arrays are damaged, missing, or do not fit each other.
    """
    batch = _read_batch(path, open_npz(path))
    return Dataset(
        path=path,
        format="probe-npz",
        num_dense=batch.dense.shape[1],
        feature_names=batch.feature_names,
        names_are_positional=are_positional(batch.feature_names),
        has_labels=False,
        has_logits=batch.logits is not None,
        feature_order="fed",
        dense_order="fed",
        dense_form=None,
        source=HeldBlock(batch=batch),
    )


def _read_batch(path: Path, arrays: Mapping[str, StoredArray]) -> Batch:
    names = _feature_names(path, arrays["feature_names"])
    missing = [
        f"{kind}_{i} ({name})"
        for i, name in enumerate(names)
        for kind in ("values", "offsets")
        if f"{kind}_{i}" not in arrays
    ]
    if missing:
        raise DataError(
            f"{path}: arrays of {len(names)} features are missing",
            expected="values_i and offsets_i for every i of feature_names",
            hint="write the probe again, with all features",
            details=missing,
        )
    bags = tuple(_read_bag(path, arrays, i, name) for i, name in enumerate(names))
    num_rows = len(bags[0].offsets) - 1
    sizes = {f"offsets_{i}": len(bag.offsets) - 1 for i, bag in enumerate(bags)}
    sizes |= {key: (*arrays[key].shape, 0)[0] for key in ("dense", "logits") if key in arrays}
    wrong = [f"{key}: {size} rows" for key, size in sizes.items() if size != num_rows]
    if wrong:
        raise DataError(
            f"{path}: lengths disagree with the {num_rows} rows of offsets_0",
            expected="the same number of rows B everywhere, offsets of shape (B + 1,)",
            hint="write the probe again, from one batch",
            details=wrong,
        )
    return Batch(
        dense=_read_dense(path, arrays, num_rows),
        feature_names=names,
        bags=bags,
        logits=_read_logits(path, arrays, num_rows),
    )


def _feature_names(path: Path, array: StoredArray) -> tuple[str, ...]:
    if array.dtype.kind not in "US" or len(array.shape) != 1 or not array.shape[0]:
        raise DataError(
            f"{path}: feature_names has dtype {array.dtype} and shape {array.shape}",
            expected="strings, shape (F,)",
            hint="write it as np.array([...], dtype=str)",
        )
    names = array.read()
    decoded = np.char.decode(names, "utf-8") if array.dtype.kind == "S" else names
    return check_unique([str(name) for name in decoded], path)


def _read_bag(path: Path, arrays: Mapping[str, StoredArray], i: int, name: str) -> Bag:
    values, offsets = arrays[f"values_{i}"], arrays[f"offsets_{i}"]
    for array in (values, offsets):
        if array.dtype.kind not in "iu" or len(array.shape) != 1:
            raise DataError(
                f"{path}: {array.name} ({name}) has dtype {array.dtype} and shape {array.shape}",
                expected="integers, one dimension",
            )
    checked = check_offsets(offsets.read(), values.shape[0], path, name)
    place = RowPlace(file=path, rows=slice(0, len(checked) - 1))
    weights = arrays.get(f"weights_{i}")
    return Bag(
        values=check_ids(values.read(), checked, place, name),
        offsets=checked,
        weights=None if weights is None else check_weights(weights.read(), checked, place, name),
    )


def _read_dense(path: Path, arrays: Mapping[str, StoredArray], num_rows: int) -> Float32Array:
    stored = arrays.get("dense")
    if stored is None:
        return np.zeros((num_rows, 0), dtype=np.float32)
    if len(stored.shape) != 2 or stored.dtype.kind not in "biuf":
        raise DataError(
            f"{path}: dense has dtype {stored.dtype} and shape {stored.shape}",
            expected="numbers, shape (B, D)",
        )
    place = RowPlace(file=path, rows=slice(0, num_rows))
    return check_dense(stored.read(), place, [f"dense[{i}]" for i in range(stored.shape[1])])


def _read_logits(
    path: Path, arrays: Mapping[str, StoredArray], num_rows: int
) -> Float32Array | None:
    stored = arrays.get("logits")
    if stored is None:
        return None
    if stored.shape[1:] not in ((), (1,)) or stored.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: logits has dtype {stored.dtype} and shape {stored.shape}",
            expected="numbers, shape (B,)",
        )
    place = RowPlace(file=path, rows=slice(0, num_rows))
    return check_dense(stored.read().reshape(-1, 1), place, ["logits"])[:, 0]
