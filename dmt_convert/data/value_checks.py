"""Checks of values as they are read; every refusal names file, column and row.

Rows are counted from 0 inside the file. Letters: B batch, D dense inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.data.batch import Rows
from dmt_convert.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlace:
    """Where the rows of an array came from."""

    file: Path
    """The file."""
    rows: Rows
    """Row numbers in the file, in the order of the array."""

    def row(self, index: int) -> int:
        """Row number in the file of the array's row `index`."""
        if isinstance(self.rows, slice):
            return int(self.rows.start) + index
        return int(self.rows[index])


def refuse_value(
    place: RowPlace, column: str, index: int, found: str, *, expected: str, hint: str = ""
) -> DataError:
    """Make the error for one bad value in row `index` of the array."""
    return DataError(
        f"{place.file}: column {column!r}, row {place.row(index)} (from 0): {found}",
        expected=expected,
        hint=hint,
    )


@dataclass(slots=True)
class ValueFaults:
    """Values that cannot be used, by column: the first refusal, and how many rows are like it."""

    first: dict[str, DataError] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, column: str, error: DataError, count: int) -> None:
        """Count rows whose value cannot be used."""
        self.first.setdefault(column, error)
        self.counts[column] = self.counts.get(column, 0) + count


_COLLECTED: Final[ContextVar[ValueFaults | None]] = ContextVar("_COLLECTED", default=None)


@contextmanager
def collect_faults() -> Iterator[ValueFaults]:
    """Collect bad values instead of refusing them at the first: for reports on whole data sets.

    Inside, ids that are no whole numbers are read as 0, negative ids and other values as they are.
    """
    faults = ValueFaults()
    token = _COLLECTED.set(faults)
    try:
        yield faults
    finally:
        _COLLECTED.reset(token)


def _refuse(column: str, error: DataError, count: int) -> None:
    """Raise the error, or count it if faults are collected."""
    collected = _COLLECTED.get()
    if collected is None:
        raise error
    collected.add(column, error, count)


def check_dense(dense: AnyArray, place: RowPlace, columns: Sequence[str]) -> Float32Array:
    """Return dense inputs as float32, shape (B, D), or refuse what is not finite.

    Raises:
        DataError: A value is NaN or infinite.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(dense, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        for column in np.flatnonzero(~finite.all(axis=0)).tolist():
            bad = np.flatnonzero(~finite[:, column])
            error = refuse_value(
                place,
                columns[column],
                int(bad[0]),
                f"{dense[bad[0], column]}",
                expected="finite numbers (float32) as dense inputs",
                hint="fill in missing values first, as for training",
            )
            _refuse(columns[column], error, len(bad))
    return values


def check_labels(labels: AnyArray, place: RowPlace, column: str) -> Float32Array:
    """Return labels as float32, shape (B,), or refuse what is neither 0 nor 1.

    Raises:
        DataError: A label is neither 0 nor 1.
    """
    raw = labels.reshape(-1)
    good = (raw == 0) | (raw == 1)
    if not good.all():
        index = int(np.flatnonzero(~good)[0])
        error = refuse_value(
            place,
            column,
            index,
            f"label {raw[index]}",
            expected="0 or 1 as label",
            hint="binarise the labels, or leave the label column out if the rows have none",
        )
        _refuse(column, error, int((~good).sum()))
    return np.where(good, raw, np.nan).astype(np.float32)


def check_ids(
    ids: AnyArray, offsets: IntArray, place: RowPlace, column: str, *, allow_negative: bool = False
) -> IntArray:
    """Return one feature's ids as int64, shape (nnz,), or refuse what cannot be one.

    Whole numbers stored as floats pass: the DLRM trainer stores ids so.

    Args:
        ids: Ids, shape (nnz,), integer or float.
        offsets: Where every row's ids begin, then nnz, shape (B + 1,).
        place: Where the rows came from.
        column: Name of the feature.
        allow_negative: Whether negative ids pass (they are hashed later).

    Raises:
        DataError: An id is negative, fractional or too large for int64.
    """
    bad = np.zeros(0, dtype=bool)
    if ids.dtype.kind == "f":
        bad = ~(np.isfinite(ids) & (ids == np.floor(ids)) & (np.abs(ids) < 2.0**63))
    elif ids.dtype == np.uint64:
        bad = ids > np.iinfo(np.int64).max
    whole = np.where(bad, 0, ids) if bad.any() else ids
    values: IntArray = np.ascontiguousarray(whole, dtype=np.int64)
    if not bad.any():
        if (
            allow_negative
            or _COLLECTED.get() is not None
            or not len(values)
            or int(values.min()) >= 0
        ):
            return values
        bad = values < 0
    at = int(np.flatnonzero(bad)[0])
    error = refuse_value(
        place,
        column,
        int(np.searchsorted(offsets, at, side="right")) - 1,
        f"id {ids[at]}",
        expected="whole ids from 0",
        hint="map missing or unknown ids to a row of the table, as for training",
    )
    _refuse(column, error, int(bad.sum()))
    return values


def check_offsets(offsets: AnyArray, num_values: int, file: Path, column: str) -> IntArray:
    """Return a feature's offsets as int64, shape (B + 1,), or refuse what is not in CSR form.

    Raises:
        DataError: Offsets do not begin at 0, do not ascend, or do not end at the number of values.
    """
    values: IntArray = np.ascontiguousarray(offsets, dtype=np.int64)
    found = ""
    if values.ndim != 1 or not len(values):
        found = f"offsets of shape {values.shape}"
    elif values[0] != 0:
        found = f"offsets begin at {values[0]}"
    elif (np.diff(values) < 0).any():
        row = int(np.flatnonzero(np.diff(values) < 0)[0])
        found = f"offsets fall from {values[row]} to {values[row + 1]} at row {row} (from 0)"
    elif values[-1] != num_values:
        found = f"offsets end at {values[-1]} (row {len(values) - 2}) for {num_values} values"
    if found:
        raise DataError(
            f"{file}: column {column!r}: {found}",
            expected="offsets of shape (B + 1,) that begin at 0, ascend, and end at the number "
            "of values",
        )
    return values


def check_weights(
    weights: AnyArray, offsets: IntArray, place: RowPlace, column: str
) -> Float32Array:
    """Return a feature's weights as float32, shape (nnz,), or refuse what does not fit the ids.

    Raises:
        DataError: There is not one finite weight per id.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(weights, dtype=np.float32)
    if values.shape != (int(offsets[-1]),):
        raise DataError(
            f"{place.file}: column {column!r}: {values.size} weights for {int(offsets[-1])} ids",
            expected="one weight per id",
        )
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        raise refuse_value(
            place,
            column,
            int(np.searchsorted(offsets, at, side="right")) - 1,
            f"weight {values[at]}",
            expected="finite weights",
        )
    return values
