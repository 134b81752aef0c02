"""Tensors that are computed from others, any rows at a time, and lie in no file.

A checkpoint may hold a table as two factors, or a layer whose columns are in another order than
ours. Every function here describes what we want of it as a `TensorInfo`, which is then streamed,
looked up, digested and checked as any other; memory stays at some blocks of rows. Rearranged
elements keep their bytes and their dtype; computed ones are fp32.

The first axis of a tensor counts its rows. Letters: R rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dmt_convert.checkpoint.derived_rows import (
    Affine,
    Cast,
    Columns,
    Combination,
    Combined,
    Dequantised,
    Filled,
    InMemory,
    Projected,
    Reshaped,
    RowCodes,
    Rows,
    Scaled,
    SideBySide,
    Stacked,
    Transposed,
    Viewed,
)
from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    ByteRows,
    Derivation,
    Piece,
    TensorInfo,
)


def describe(
    shape: tuple[int, ...], derivation: Derivation, *, dtype: str = "fp32", name: str | None = None
) -> TensorInfo:
    """Describe a derived tensor.

    Args:
        shape: Its shape.
        derivation: How it is computed.
        dtype: Its dtype.
        name: What errors call it; the names of its sources by default.
    """
    sources = derivation.sources
    return TensorInfo(
        name=name or " and ".join(source.name for source in sources),
        container=sources[0].container if sources else (),
        dtype=dtype,
        shape=shape,
        pieces=(),
        derivation=derivation,
    )


def select_columns(source: TensorInfo, columns: Sequence[int]) -> TensorInfo:
    """Choose, repeat or reorder the columns of a matrix (R, N).

    Args:
        source: The matrix.
        columns: For each wanted column, which one of the source it is; -1: a column of zeros.
    """
    rows, width = source.shape
    assert all(-1 <= column < width for column in columns), (columns, width)
    if list(columns) == list(range(width)):
        return source
    derivation = Columns(source=source, columns=tuple(columns))
    return describe((rows, len(columns)), derivation, dtype=source.dtype)


def select_rows(source: TensorInfo, rows: Sequence[int]) -> TensorInfo:
    """Choose, repeat or reorder the rows of a tensor of any rank (the elements of a vector)."""
    assert all(0 <= row < source.shape[0] for row in rows), (rows, source.shape)
    derivation = Rows(source=source, rows=tuple(rows))
    return describe((len(rows), *source.shape[1:]), derivation, dtype=source.dtype)


def slice_rows(source: TensorInfo, begin: int, end: int) -> TensorInfo:
    """Take the rows from `begin` up to `end`, without it."""
    if (begin, end) == (0, source.shape[0]):
        return source
    assert 0 <= begin <= end <= source.shape[0], (begin, end, source.shape)
    shape = (end - begin, *source.shape[1:])
    piece = _only_piece(source)
    if piece is None or piece.crc32 is not None:  # a checksum is one of all the bytes
        rows = range(begin, end)
        return describe(shape, Rows(source=source, rows=rows), dtype=source.dtype)
    row_bytes = math.prod(source.shape[1:]) * ITEM_BYTES[source.dtype]
    part = replace(
        piece,
        offset=piece.offset + begin * row_bytes,
        length=(end - begin) * row_bytes,
        sizes=shape,
    )
    return replace(source, shape=shape, pieces=(part,))


def take_index(source: TensorInfo, index: int) -> TensorInfo:
    """Take one row of a tensor (L, ...) as a tensor (...)."""
    return reshape(slice_rows(source, index, index + 1), source.shape[1:])


def reshape(source: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """Read the same elements, row-major, as a tensor of another shape."""
    assert math.prod(shape) == math.prod(source.shape), (shape, source.shape)
    if shape == source.shape:
        return source
    piece = _only_piece(source)
    if piece is not None:
        part = replace(piece, starts=(0,) * len(shape), sizes=shape)
        return replace(source, shape=shape, pieces=(part,))
    width = math.prod(shape[1:])
    return describe(shape, Reshaped(source=source, width=width), dtype=source.dtype)


def transpose(source: TensorInfo) -> TensorInfo:
    """Swap the two axes of a matrix; each block of its rows reads the source once."""
    rows, width = source.shape
    return describe((width, rows), Transposed(source=source), dtype=source.dtype)


def concat_columns(*parts: TensorInfo) -> TensorInfo:
    """Put matrices (R, N_i) and vectors (R,) of as many rows side by side: (R, sum N_i).

    The dtype is the sources' own if they agree, otherwise fp32.
    """
    rows = {part.shape[0] for part in parts}
    assert len(rows) == 1, rows
    dtype = _common_dtype(parts)
    width = sum(math.prod(part.shape[1:]) for part in parts)
    return describe((rows.pop(), width), SideBySide(sources=parts, dtype=dtype), dtype=dtype)


def concat_rows(*parts: TensorInfo) -> TensorInfo:
    """Put tensors one below the other; the dtype as for `concat_columns`."""
    assert len({part.shape[1:] for part in parts}) == 1, [part.shape for part in parts]
    dtype = _common_dtype(parts)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return describe(shape, Stacked(sources=parts, dtype=dtype), dtype=dtype)


def fill(name: str, shape: tuple[int, ...], value: float = 0.0) -> TensorInfo:
    """Describe a tensor that is the same number all over, such as a bias that a trainer omits."""
    return describe(shape, Filled(width=math.prod(shape[1:]), value=value), name=name)


def in_memory(name: str, dtype: str, shape: tuple[int, ...], data: ByteRows) -> TensorInfo:
    """Describe a tensor that lies in memory; it must not change as long as it is read.

    Args:
        name: What it is called.
        dtype: Its dtype.
        shape: Its shape.
        data: Its bytes, row-major.
    """
    rows = data.reshape(shape[0] if shape else 1, -1)
    return describe(shape, InMemory(rows=rows), dtype=dtype, name=name)


def combine_rows(quotient: TensorInfo, remainder: TensorInfo, how: Combination) -> TensorInfo:
    """Spell out a quotient-remainder table: row i is made of q[i // r_rows] and r[i % r_rows].

    The division is that of facebookresearch/dlrm, in fp32, which is inexact from 2^24 on.

    Args:
        quotient: Shape (q_rows, N).
        remainder: Shape (r_rows, N); for `concat` its N may differ.
        how: The two rows' product, sum, or both side by side.

    Returns:
        fp32, shape (q_rows * r_rows, N), for `concat` as wide as both.
    """
    rows = quotient.shape[0] * remainder.shape[0]
    width = quotient.shape[1] + (remainder.shape[1] if how == "concat" else 0)
    assert how == "concat" or quotient.shape[1] == remainder.shape[1]
    return describe((rows, width), Combined(quotient=quotient, remainder=remainder, how=how))


def project_rows(source: TensorInfo, weight: TensorInfo) -> TensorInfo:
    """Multiply a table (R, n) by the weight (N, n) of a linear layer: fp32, shape (R, N)."""
    assert source.shape[1] == weight.shape[1], (source.shape, weight.shape)
    shape = (source.shape[0], weight.shape[0])
    return describe(shape, Projected(source=source, weight=weight))


def cast_rows(source: TensorInfo) -> TensorInfo:
    """Read a tensor (R, ...) of any float dtype as fp32."""
    return describe(source.shape, Cast(source=source))


def scale_rows(source: TensorInfo, factors: TensorInfo) -> TensorInfo:
    """Multiply each row of a table (R, N) by its own factor, (R,) or (R, 1): fp32."""
    assert math.prod(factors.shape) == factors.shape[0] == source.shape[0]
    return describe(source.shape, Scaled(source=source, factors=factors))


def decode_rows(
    codes: TensorInfo, scale: TensorInfo, bias: TensorInfo, *, bits: int, dim: int
) -> TensorInfo:
    """Decode codes (R, bytes) by a scale and a bias per row, (R,) or (R, 1): fp32, (R, dim).

    Args:
        codes: The codes, uint8.
        scale: One number per row.
        bias: One number per row.
        bits: Bits per code: 8, 4 or 2.
        dim: Codes per row.
    """
    assert all(math.prod(part.shape) == part.shape[0] == codes.shape[0] for part in (scale, bias))
    derivation = Affine(source=codes, scale=scale, bias=bias, bits=bits, dim=dim)
    return describe((codes.shape[0], dim), derivation)


def view_rows(source: TensorInfo, dim: int, dtype: str) -> TensorInfo:
    """Read rows of bytes (R, bytes) as floats (R, dim); what is left of a row is padding."""
    width = dim * ITEM_BYTES[dtype]
    assert source.dtype == "uint8" and width <= source.shape[1]
    return describe((source.shape[0], dim), Viewed(source=source, width=width), dtype=dtype)


def dequantise_rows(source: TensorInfo, dim: int, codes: RowCodes) -> TensorInfo:
    """Decode a table of rows of codes (R, bytes), each with its scale and bias: fp32, (R, dim).

    Args:
        source: The table, uint8.
        dim: Elements per row; what is left of a row's bytes is padding.
        codes: Where scale and bias stand in a row, and their dtype.
    """
    assert source.dtype == "uint8" and codes.row_bytes(dim) <= source.shape[1]
    shape = (source.shape[0], dim)
    return describe(shape, Dequantised(source=source, dim=dim, codes=codes))


def _only_piece(source: TensorInfo) -> Piece | None:
    """Return the one range of bytes that a tensor is, row-major; None if it is not one."""
    if source.derivation is not None or len(source.pieces) != 1:
        return None
    (piece,) = source.pieces
    whole = piece.sizes == source.shape and not any(piece.starts)
    return piece if piece.encoding == "raw" and piece.strides is None and whole else None


def _common_dtype(parts: Sequence[TensorInfo]) -> str:
    dtypes = {part.dtype for part in parts}
    return dtypes.pop() if len(dtypes) == 1 else "fp32"
