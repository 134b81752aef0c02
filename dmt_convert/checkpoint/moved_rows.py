"""How derived tensors are computed where elements only change their place; see `derived`.

Letters: n rows asked for, R rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, TensorInfo
from dmt_convert.checkpoint.tensor_bytes import CHUNK_BYTES, ByteRows, gather_bytes, to_fp32

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneSource:
    """A derivation of one tensor."""

    source: TensorInfo
    """What it is computed from."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The source alone."""
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns(OneSource):
    """Some columns of a matrix."""

    columns: tuple[int, ...]
    """For each column, which one of the source it is; -1: zeros."""

    def gather(self, rows: Index) -> ByteRows:
        """Pick the columns of these rows, shape (n, bytes per row)."""
        item = ITEM_BYTES[self.source.dtype]
        block = gather_bytes(self.source, rows).reshape(len(rows), self.source.shape[1], item)
        columns = np.array(self.columns, dtype=np.int64)
        picked = block[:, columns]
        picked[:, columns < 0] = 0
        return picked.reshape(len(rows), len(columns) * item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(OneSource):
    """Some rows of a tensor."""

    rows: tuple[int, ...] | range
    """For each row, which one of the source it is."""

    def gather(self, rows: Index) -> ByteRows:
        """Look the rows up under their numbers in the source."""
        if isinstance(self.rows, range):  # as long as a table may be, and never spelt out
            return gather_bytes(self.source, self.rows.start + rows * self.rows.step)
        return gather_bytes(self.source, np.array(self.rows, dtype=np.int64)[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshaped(OneSource):
    """The same elements in rows of another length."""

    width: int
    """Elements per row."""

    def gather(self, rows: Index) -> ByteRows:
        """Cut the rows out of those of the source that they overlap, or put them together."""
        item = ITEM_BYTES[self.source.dtype]
        total = int(np.prod(self.source.shape, dtype=np.int64))
        source_rows = self.source.shape[0] if self.source.shape else 1
        old, new = total // source_rows, self.width
        if new % old == 0:
            ratio = new // old
            parts = rows[:, None] * ratio + np.arange(ratio, dtype=np.int64)
            return gather_bytes(self.source, parts.reshape(-1)).reshape(len(rows), new * item)
        if old % new == 0:
            ratio = old // new
            wanted, place = np.unique(rows // ratio, return_inverse=True)
            blocks = gather_bytes(self.source, wanted).reshape(len(wanted), ratio, new * item)
            return blocks[place, rows % ratio]
        whole = gather_bytes(self.source, np.arange(source_rows, dtype=np.int64))
        return whole.reshape(total // new, new * item)[rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed(OneSource):
    """A matrix with its axes swapped."""

    def gather(self, rows: Index) -> ByteRows:
        """Read the source in blocks of rows, and keep these columns of it."""
        item = ITEM_BYTES[self.source.dtype]
        height, width = self.source.shape
        out = np.empty((len(rows), height, item), dtype=np.uint8)
        step = max(1, CHUNK_BYTES // (width * item))
        for begin in range(0, height, step):
            index = np.arange(begin, min(begin + step, height), dtype=np.int64)
            block = gather_bytes(self.source, index).reshape(len(index), width, item)
            out[:, begin : begin + len(index)] = block[:, rows].swapaxes(0, 1)
        return out.reshape(len(rows), height * item)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Matrices and vectors of as many rows, side by side."""

    sources: tuple[TensorInfo, ...]
    """What stands side by side, from left to right."""
    dtype: str
    """Dtype of the result."""

    def gather(self, rows: Index) -> ByteRows:
        """Read the rows of all and put them together."""
        return np.concatenate([_gather_as(s, rows, self.dtype) for s in self.sources], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """Tensors of the same rows' shape, one below the other."""

    sources: tuple[TensorInfo, ...]
    """What is stacked, from top to bottom."""
    dtype: str
    """Dtype of the result."""

    def gather(self, rows: Index) -> ByteRows:
        """Read each row from the source that it lies in."""
        width = int(np.prod(self.sources[0].shape[1:], dtype=np.int64))
        out = np.empty((len(rows), width * ITEM_BYTES[self.dtype]), dtype=np.uint8)
        begin = 0
        for source in self.sources:
            end = begin + source.shape[0]
            picked = np.flatnonzero((rows >= begin) & (rows < end))
            if len(picked):
                out[picked] = _gather_as(source, rows[picked] - begin, self.dtype)
            begin = end
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """One number all over, in fp32."""

    width: int
    """Elements per row."""
    value: float
    """The number."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """None."""
        return ()

    def gather(self, rows: Index) -> ByteRows:
        """Make the rows."""
        return as_bytes(np.full((len(rows), self.width), self.value, dtype=np.float32))


def as_bytes(values: npt.NDArray[np.float32]) -> ByteRows:
    """Return the bytes of fp32 rows, shape (n, 4 N), from shape (n, N)."""
    out: ByteRows = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
    return out


def _gather_as(source: TensorInfo, rows: Index, dtype: str) -> ByteRows:
    raw = gather_bytes(source, rows)
    return raw if source.dtype == dtype else as_bytes(to_fp32(raw, source.dtype))
