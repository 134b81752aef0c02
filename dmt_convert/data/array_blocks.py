"""Blocks over stored arrays: dense inputs, ids and labels with one row per sample.

Letters: n rows of a file, D dense inputs, F features, L ids per row of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from dmt_convert.data.batch import Bag, Batch, FloatArray, IntArray
from dmt_convert.data.row_blocks import TakeRows
from dmt_convert.data.row_selection import uniform_offsets
from dmt_convert.data.stored_arrays import StoredArray
from dmt_convert.data.value_checks import (
    AnyArray,
    RowPlace,
    Rows,
    check_dense,
    check_ids,
    check_labels,
)
from dmt_convert.errors import DataError

BLOCK_ROWS: Final = 1 << 22
"""Rows per block: smaller data sets are shuffled as a whole, 32 MiB of row numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPart:
    """The arrays of one set of n rows; shapes are checked when it is made."""

    dense: StoredArray | None
    """Dense inputs, shape (n, D), or None for D = 0."""
    ids: tuple[StoredArray, ...]
    """One matrix (n, F) of single ids, or one array (n, L) per feature."""
    is_matrix: bool
    """Whether `ids` is the one matrix."""
    labels: StoredArray | None
    """Labels, shape (n,) or (n, 1)."""

    def __post_init__(self) -> None:
        arrays = [array for array in (self.dense, *self.ids, self.labels) if array is not None]
        shapes = [f"{array.name}: {array.shape}" for array in arrays]
        file = arrays[0].file
        flat = self.labels is None or self.labels.shape[1:] in ((), (1,))
        matrices = (*(() if self.dense is None else (self.dense,)), *self.ids)
        if not flat or any(len(array.shape) != 2 for array in matrices):
            raise DataError(
                f"{file}: arrays of unexpected shapes",
                expected="dense inputs (n, D), ids (n, F), labels (n,)",
                hint="write one row per sample",
                details=shapes,
            )
        if len({array.shape[0] for array in arrays}) > 1:
            raise DataError(
                f"{file}: arrays whose lengths disagree",
                expected="the same number of rows in all arrays",
                hint="check that the files belong together and were written whole",
                details=shapes,
            )
        for array in self.ids:
            _check_kind(array, "iuf", "ids")
        for other in (self.dense, self.labels):
            if other is not None:
                _check_kind(other, "biuf", "numbers")

    @property
    def num_rows(self) -> int:
        """Number of rows n."""
        return self.ids[0].shape[0]

    @property
    def num_dense(self) -> int:
        """Number of dense inputs D."""
        return 0 if self.dense is None else self.dense.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return self.ids[0].shape[1] if self.is_matrix else len(self.ids)


def _check_kind(array: StoredArray, kinds: str, noun: str) -> None:
    if array.dtype.kind not in kinds:
        raise DataError(
            f"{array.file}: array {array.name!r} of dtype {array.dtype}",
            expected=f"{noun}",
            hint="write the array with a numeric dtype",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayBlocks:
    """A `BlockSource` over parts that follow each other."""

    parts: tuple[ArrayPart, ...]
    """All with the same D, F and kind of ids."""
    feature_names: tuple[str, ...]
    """Names of the features."""
    dense_names: tuple[str, ...]
    """Names of the dense inputs, for messages."""
    transform: Callable[[AnyArray], AnyArray] | None = None
    """What turns stored dense inputs into what the model is fed."""
    allow_negative: bool = False
    """Whether negative ids pass (they are hashed later)."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every block."""
        return tuple(last - first for _, first, last in self._blocks())

    @property
    def keeps_block_order(self) -> bool:
        """Arrays can be read in any order."""
        return False

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Yield the blocks asked for; rows are read when taken."""
        ranges = self._blocks()
        for block in blocks:
            part, first, _ = ranges[block]
            yield partial(self._take, part, first)

    def _blocks(self) -> list[tuple[ArrayPart, int, int]]:
        blocks = []
        for part in self.parts:
            edges = [*range(0, part.num_rows, BLOCK_ROWS), part.num_rows]
            blocks += [(part, first, last) for first, last in pairwise(edges)]
        return blocks

    def _take(self, part: ArrayPart, first: int, rows: Rows) -> Batch:
        if isinstance(rows, slice):
            rows = slice(first + rows.start, first + rows.stop)
        else:
            rows = first + rows
        return Batch(
            dense=self._dense(part, rows),
            feature_names=self.feature_names,
            bags=self._matrix_bags(part, rows) if part.is_matrix else self._bags(part, rows),
            labels=_labels(part, rows),
        )

    def _dense(self, part: ArrayPart, rows: Rows) -> FloatArray:
        if part.dense is None:
            return np.zeros((_count(rows), 0), dtype=np.float32)
        values = part.dense.read()[rows]
        if self.transform is not None:
            values = self.transform(values)
        return check_dense(values, RowPlace(file=part.dense.file, rows=rows), self.dense_names)

    def _matrix_bags(self, part: ArrayPart, rows: Rows) -> tuple[Bag, ...]:
        (stored,) = part.ids
        columns = np.ascontiguousarray(stored.read()[rows].T)
        offsets = uniform_offsets(columns.shape[1], 1)
        place = RowPlace(file=stored.file, rows=rows)
        return tuple(
            self._bag(column, offsets, place, name)
            for name, column in zip(self.feature_names, columns, strict=True)
        )

    def _bags(self, part: ArrayPart, rows: Rows) -> tuple[Bag, ...]:
        return tuple(
            self._bag(
                stored.read()[rows].reshape(-1),
                uniform_offsets(_count(rows), stored.shape[1]),
                RowPlace(file=stored.file, rows=rows),
                name,
            )
            for name, stored in zip(self.feature_names, part.ids, strict=True)
        )

    def _bag(self, ids: AnyArray, offsets: IntArray, place: RowPlace, name: str) -> Bag:
        values = check_ids(ids, offsets, place, name, allow_negative=self.allow_negative)
        return Bag(values=values, offsets=offsets)


def _labels(part: ArrayPart, rows: Rows) -> FloatArray | None:
    if part.labels is None:
        return None
    place = RowPlace(file=part.labels.file, rows=rows)
    return check_labels(part.labels.read()[rows], place, part.labels.name)


def _count(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)
