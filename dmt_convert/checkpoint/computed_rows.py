"""How derived tensors are computed where their rows are results, in fp32; see `derived`.

A row comes out the same to the bit whichever rows are asked for with it, so that a lookup and a
copy of the table agree. That is why a projection is no matrix product, whose sums BLAS orders by
the shape of the block.

Letters: n rows asked for, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmt_convert.checkpoint.flat_checkpoint import TensorInfo
from dmt_convert.checkpoint.moved_rows import Index, OneSource, as_bytes
from dmt_convert.checkpoint.tensor_bytes import ByteRows, gather_bytes, read_tensor, to_fp32

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

    def gather(self, rows: Index) -> ByteRows:
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

    def gather(self, rows: Index) -> ByteRows:
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

    def gather(self, rows: Index) -> ByteRows:
        """Multiply these rows by theirs."""
        block = to_fp32(gather_bytes(self.source, rows), self.source.dtype)
        return as_bytes(block * to_fp32(gather_bytes(self.factors, rows), self.factors.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(OneSource):
    """A table of 8-bit codes whose rows' scales and biases are tensors of their own."""

    scale: TensorInfo
    """One number per row."""
    bias: TensorInfo
    """One number per row."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """Codes, scales and biases."""
        return self.source, self.scale, self.bias

    def gather(self, rows: Index) -> ByteRows:
        """Decode these rows."""
        codes, scale, bias = (
            to_fp32(gather_bytes(part, rows), part.dtype) for part in self.sources
        )
        return as_bytes(codes * scale + bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCodes:
    """Where an 8-bit row keeps its scale and bias: value = code * scale + bias."""

    dtype: Literal["fp16", "fp32"]
    """Dtype of scale and bias."""
    at_end: bool
    """Whether they follow the codes; else they stand before them."""

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of `dim` elements, without padding."""
        return dim + 2 * self._item

    @property
    def _item(self) -> int:
        return 2 if self.dtype == "fp16" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantised(OneSource):
    """A table of 8-bit rows in fp32."""

    dim: int
    """Elements per row."""
    codes: RowCodes
    """How a row is laid out."""

    def gather(self, rows: Index) -> ByteRows:
        """Decode these rows."""
        raw = gather_bytes(self.source, rows)
        pair = self.codes.row_bytes(self.dim) - self.dim
        begin, place = (0, self.dim) if self.codes.at_end else (pair, 0)
        numbers = to_fp32(np.ascontiguousarray(raw[:, place : place + pair]), self.codes.dtype)
        values = raw[:, begin : begin + self.dim].astype(np.float32)
        return as_bytes(values * numbers[:, :1] + numbers[:, 1:])
