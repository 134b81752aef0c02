"""How derived tensors are computed, any rows at a time; see `derived`.

First come those whose elements only change their place and keep their bytes. Then those whose rows
are results, in fp32: a row comes out the same to the bit whichever rows are asked for with it, so
that a lookup and a copy of the table agree. That is why a projection is not a matrix product, whose
sums BLAS orders by the shape of the block.

Letters: n rows asked for, R rows, N columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmt_convert.arrays import Float32Array, IntArray
from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, ByteRows, TensorInfo
from dmt_convert.checkpoint.tensor_bytes import (
    CHUNK_BYTES,
    gather_bytes,
    read_tensor,
    to_fp32,
)


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

    def gather(self, rows: IntArray) -> ByteRows:
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

    def gather(self, rows: IntArray) -> ByteRows:
        """Look the rows up under their numbers in the source."""
        if isinstance(self.rows, range):  # as long as a table may be, and never spelt out
            return gather_bytes(self.source, self.rows.start + rows * self.rows.step)
        return gather_bytes(self.source, np.array(self.rows, dtype=np.int64)[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshaped(OneSource):
    """The same elements in rows of another length."""

    width: int
    """Elements per row."""

    def gather(self, rows: IntArray) -> ByteRows:
        """Cut the rows out of those of the source that they overlap, or put them together."""
        item = ITEM_BYTES[self.source.dtype]
        total = math.prod(self.source.shape)
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

    def gather(self, rows: IntArray) -> ByteRows:
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

    def gather(self, rows: IntArray) -> ByteRows:
        """Read the rows of all and put them together."""
        return np.concatenate([_gather_as(s, rows, self.dtype) for s in self.sources], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """Tensors of the same rows' shape, one below the other."""

    sources: tuple[TensorInfo, ...]
    """What is stacked, from top to bottom."""
    dtype: str
    """Dtype of the result."""

    def gather(self, rows: IntArray) -> ByteRows:
        """Read each row from the source that it lies in."""
        width = math.prod(self.sources[0].shape[1:])
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

    def gather(self, rows: IntArray) -> ByteRows:
        """Make the rows."""
        return as_bytes(np.full((len(rows), self.width), self.value, dtype=np.float32))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InMemory:
    """A tensor that lies in memory, such as one of a live module."""

    rows: ByteRows
    """Its bytes, shape (R, bytes per row)."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """None."""
        return ()

    def gather(self, rows: IntArray) -> ByteRows:
        """Copy the rows."""
        out: ByteRows = self.rows[rows]
        return out


def as_bytes(values: Float32Array) -> ByteRows:
    """Return the bytes of fp32 rows, shape (n, 4 N), from shape (n, N)."""
    out: ByteRows = np.ascontiguousarray(values, dtype="<f4").view(np.uint8)
    return out


def _gather_as(source: TensorInfo, rows: IntArray, dtype: str) -> ByteRows:
    raw = gather_bytes(source, rows)
    return raw if source.dtype == dtype else as_bytes(to_fp32(raw, source.dtype))


Combination = Literal["mult", "add", "concat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """A quotient-remainder table, spelt out."""

    quotient: TensorInfo
    """Row i // r_rows of it belongs to id i, as fp32 divides."""
    remainder: TensorInfo
    """Row i % r_rows of it belongs to id i; r_rows is its number of rows."""
    how: Combination
    """What is made of the two rows."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """Both tables."""
        return self.quotient, self.remainder

    def gather(self, rows: IntArray) -> ByteRows:
        """Look up both parts of every id."""
        collisions, quotients = self.remainder.shape[0], self.quotient.shape[0]
        # the trainer divides in fp32, so that of huge ids some fall to the next quotient
        quotient = (rows.astype(np.float32) / np.float32(collisions)).astype(np.int64)
        wanted, place = np.unique(np.minimum(quotient, quotients - 1), return_inverse=True)
        q = to_fp32(gather_bytes(self.quotient, wanted), self.quotient.dtype)[place]
        wanted, place = np.unique(rows % collisions, return_inverse=True)
        r = to_fp32(gather_bytes(self.remainder, wanted), self.remainder.dtype)[place]
        if self.how == "concat":
            return as_bytes(np.concatenate([q, r], axis=1))
        return as_bytes(q * r if self.how == "mult" else q + r)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected(OneSource):
    """A table behind a linear layer without bias."""

    weight: TensorInfo
    """The layer's weight, shape (N, columns of the table)."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The table and the weight."""
        return self.source, self.weight

    def gather(self, rows: IntArray) -> ByteRows:
        """Add up one column after another, in fp64."""
        block = to_fp32(gather_bytes(self.source, rows), self.source.dtype)
        weight = np.asarray(read_tensor(self.weight), dtype=np.float64)
        out = np.zeros((len(rows), len(weight)))
        for column in range(weight.shape[1]):
            out += block[:, column, None] * weight[:, column]
        return as_bytes(out.astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(OneSource):
    """A table whose rows have weights of their own."""

    factors: TensorInfo
    """One number per row."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The table and the factors."""
        return self.source, self.factors

    def gather(self, rows: IntArray) -> ByteRows:
        """Multiply these rows by theirs."""
        block = to_fp32(gather_bytes(self.source, rows), self.source.dtype)
        return as_bytes(block * to_fp32(gather_bytes(self.factors, rows), self.factors.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(OneSource):
    """The same numbers in fp32."""

    def gather(self, rows: IntArray) -> ByteRows:
        """Round these rows to fp32; a number beyond its range becomes infinite."""
        with np.errstate(over="ignore"):
            return as_bytes(to_fp32(gather_bytes(self.source, rows), self.source.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(OneSource):
    """A table of codes whose rows' scales and biases are tensors of their own."""

    scale: TensorInfo
    """One number per row."""
    bias: TensorInfo
    """One number per row."""
    bits: int
    """Bits per code."""
    dim: int
    """Codes per row."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """Codes, scales and biases."""
        return self.source, self.scale, self.bias

    def gather(self, rows: IntArray) -> ByteRows:
        """Decode these rows."""
        codes = unpack_codes(gather_bytes(self.source, rows), self.bits, self.dim)
        scale, bias = (
            to_fp32(gather_bytes(part, rows), part.dtype) for part in (self.scale, self.bias)
        )
        return as_bytes(codes * scale + bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCodes:
    """Where a row of codes keeps its scale and bias: value = code * scale + bias."""

    dtype: Literal["fp16", "fp32"]
    """Dtype of scale and bias."""
    at_end: bool
    """Whether they follow the codes; else they stand before them."""
    bits: int = 8
    """Bits per code: 8, 4 or 2; those of the first elements are the low ones of a byte."""

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of `dim` elements."""
        return -(-dim * self.bits // 8)

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of `dim` elements, without padding."""
        return self.code_bytes(dim) + 2 * self._item

    @property
    def _item(self) -> int:
        return 2 if self.dtype == "fp16" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantised(OneSource):
    """A table of rows of codes in fp32."""

    dim: int
    """Elements per row."""
    codes: RowCodes
    """How a row is laid out."""

    def gather(self, rows: IntArray) -> ByteRows:
        """Decode these rows."""
        raw = gather_bytes(self.source, rows)
        size = self.codes.code_bytes(self.dim)
        pair = self.codes.row_bytes(self.dim) - size
        begin, place = (0, size) if self.codes.at_end else (pair, 0)
        numbers = to_fp32(np.ascontiguousarray(raw[:, place : place + pair]), self.codes.dtype)
        values = unpack_codes(raw[:, begin : begin + size], self.codes.bits, self.dim)
        return as_bytes(values * numbers[:, :1] + numbers[:, 1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewed(OneSource):
    """A table of floats that was saved as rows of bytes, with padding behind them."""

    width: int
    """Bytes of the floats of a row."""

    def gather(self, rows: IntArray) -> ByteRows:
        """Drop the padding of these rows."""
        return np.ascontiguousarray(gather_bytes(self.source, rows)[:, : self.width])


def unpack_codes(raw: ByteRows, bits: int, dim: int) -> Float32Array:
    """Return the codes in rows of bytes, shape (n, dim), lowest bits first."""
    if bits < 8:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        parts = (raw[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        raw = parts.reshape(len(raw), -1)
    return raw[:, :dim].astype(np.float32)
