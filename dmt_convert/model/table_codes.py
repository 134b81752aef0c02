"""Codes for the rows of tables: fp16, or 8 and 4 bits per value with a scale and a zero point.

Every row is coded by itself. The same values give the same code to the bit, whichever rows are
coded with it, so the values that a graph reads from a coded table follow from the original table.

Letters: R rows, N embedding dim, W bytes of a coded row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from dmt_convert.arrays import Float32Array
from dmt_convert.errors import ExportError

RowCode = Literal["fp16", "int8", "int4"]
IntCode = Literal["int8", "int4"]
ByteArray = npt.NDArray[np.uint8]

LEVELS: Final = {"int8": 255, "int4": 15}
"""Steps between the least and the largest value of a row."""
_BLOCK_BYTES: Final = 1 << 20
"""Rows coded at a time, so that they stay in the processor's cache."""
_SHRUNKEN: Final = (0.92, 0.84)
"""int4: shares of a row's range that are tried beside the whole. On normal and on trained rows
they take 3 to 5 % off the error (dims 16 to 128); further ones take less than 0.5 %."""
_HALF_LIMIT: Final = 65520.0
"""fp16 rounds this number and larger ones to infinity."""
_ROUNDER: Final = np.float32(1 << 23)
"""float32 numbers from here on are whole: adding it rounds, and leaves the sum in the low bits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedRows:
    """Rows in an integer code: value = (q - zero_point) * scale, in float32."""

    quantized: ByteArray
    """q, shape (R, W): one per byte for int8; for int4 the low nibbles are the first half of the
    columns and the high nibbles the second one, W = ceil(N / 2)."""
    scale: Float32Array
    """Shape (R,); 0 for rows of zeros, whose code is zero throughout."""
    zero_point: ByteArray
    """Shape (R,)."""


NameRow = Callable[[int], str]
"""Returns the name of a row for errors, given its index among the coded rows."""


def coded_width(dim: int, code: IntCode) -> int:
    """Bytes of a coded row of `dim` values, without scale and zero point."""
    return dim if code == "int8" else -(-dim // 2)


def encode_rows(rows_RN: Float32Array, code: IntCode, name_row: NameRow) -> CodedRows:
    """Code rows by integers.

    A row's range is that of its values and zero: zero stays zero. For int4 the scale is the one
    that gives the least squared error, of a few tried.

    Args:
        rows_RN: The rows.
        code: int8 or int4.
        name_row: Names a row for errors.

    Raises:
        ExportError: A row holds NaN or Inf, or so large a value that rounding would overflow.
    """
    count, dim = rows_RN.shape
    quantized = np.zeros((count, coded_width(dim, code)), dtype=np.uint8)
    scale = np.zeros(count, dtype=np.float32)
    zero_point = np.zeros(count, dtype=np.uint8)
    step = max(1, _BLOCK_BYTES // (4 * max(1, dim)))
    for begin in range(0, count, step):
        block = slice(begin, begin + step)
        rows = np.require(rows_RN[block], requirements=["C", "W"])  # torch knows no others
        if not rows.any():  # as in the hole of a sparse file
            continue
        scales, zeros = _ranges(rows, LEVELS[code])
        _check_range(rows, scales, zeros, code, partial(_name_later, name_row, begin))
        if code == "int8":
            quantized[block] = _low_bytes(_round_rows(rows / _divisor(scales), zeros, 255))
        else:
            steps, scales = _search_scales(rows, scales, zeros)
            quantized[block] = _pack(_low_bytes(steps))
        scale[block], zero_point[block] = scales, zeros
    return CodedRows(quantized=quantized, scale=scale, zero_point=zero_point)


def decode_rows(coded: CodedRows, dim: int, code: IntCode) -> Float32Array:
    """Return the values of coded rows, shape (R, N)."""
    quantized = coded.quantized
    if code == "int4":
        quantized = np.concatenate([quantized & 15, quantized >> 4], axis=1)[:, :dim]
    steps = quantized.astype(np.float32)
    steps -= coded.zero_point[:, None]
    steps *= coded.scale[:, None]
    return steps


def to_half(rows_RN: Float32Array, name_row: NameRow) -> npt.NDArray[np.float16]:
    """Round rows to fp16.

    Raises:
        ExportError: A value is beyond fp16's range.
    """
    rows = torch.from_numpy(np.require(rows_RN, requirements=["C", "W"]))
    if rows.numel():
        least, most = (float(value) for value in torch.aminmax(rows))
        if not max(-least, most) < _HALF_LIMIT:  # NaN as well
            row = int(np.flatnonzero(~(np.abs(rows_RN) < _HALF_LIMIT).all(axis=1))[0])
            raise _uncodable(rows_RN[row], name_row(row), "fp16")
    halves: npt.NDArray[np.float16] = rows.half().numpy()
    return halves


def recode_rows(rows_RN: Float32Array, code: RowCode, name_row: NameRow) -> Float32Array:
    """Code rows and decode them again, shape (R, N): the rows of a table stored in this code.

    Raises:
        ExportError: The code cannot hold them.
    """
    if code == "fp16":
        return to_half(rows_RN, name_row).astype(np.float32)
    return decode_rows(encode_rows(rows_RN, code, name_row), rows_RN.shape[1], code)


def _ranges(rows: Float32Array, levels: int) -> tuple[Float32Array, ByteArray]:
    """Scale and zero point of every row, from its least and largest value."""
    least, most = (value.numpy() for value in torch.aminmax(torch.from_numpy(rows), dim=1))
    least, most = np.minimum(least, 0), np.maximum(most, 0)
    with np.errstate(invalid="ignore"):
        extent = most.astype(np.float64) - least
        scale = (extent / levels).astype(np.float32)
        # subnormal scales are coarse: rounded down, their steps would not reach the ends
        short = scale.astype(np.float64) * levels < extent * (1 - 1e-6)
        scale = np.where(short, np.nextafter(scale, np.float32(np.inf)), scale)
        zero_point = np.rint(-least / _divisor(scale)[:, 0]).clip(0, levels)
    zero_point[~np.isfinite(zero_point)] = 0  # of rows that are refused
    return scale, zero_point.astype(np.uint8)


def _divisor(scale: Float32Array) -> Float32Array:
    """Return the scales as a column, 1 instead of 0."""
    divisor: Float32Array = np.where(scale == 0, np.float32(1), scale)
    return divisor[:, None]


def _name_later(name_row: NameRow, first: int, row: int) -> str:
    return name_row(first + row)


def _check_range(
    rows: Float32Array,
    scale: Float32Array,
    zeros: ByteArray,
    code: IntCode,
    name_row: NameRow,
) -> None:
    """Refuse rows whose codes would not all stand for a finite value."""
    with np.errstate(over="ignore", invalid="ignore"):
        # half as much again: a search may move the scale of int4 up a little
        room = np.float32(1 if code == "int8" else 1.5)
        ends = np.maximum(zeros, LEVELS[code] - zeros) * scale * room
    bad = np.flatnonzero(~np.isfinite(ends))
    if len(bad):
        row = int(bad[0])
        raise _uncodable(rows[row], name_row(row), code)


def _round_rows(steps: Float32Array, zeros: ByteArray, levels: int) -> Float32Array:
    """Round values in steps of their row's scale to q; they become q + `_ROUNDER`."""
    steps += zeros[:, None] + _ROUNDER
    np.clip(steps, _ROUNDER, _ROUNDER + np.float32(levels), out=steps)
    return steps


def _low_bytes(rounded: Float32Array) -> ByteArray:
    """Return the q that `_round_rows` left in the low bits."""
    return rounded.view(np.uint32).astype(np.uint8)


def _search_scales(
    rows: Float32Array, scale: Float32Array, zeros: ByteArray
) -> tuple[Float32Array, Float32Array]:
    """Round to 4 bits with the best of a few scales, each then fitted by least squares.

    With k = q - zero_point and y the values in steps of the plain scale, the error that remains
    is sum(y^2) - sum(y k)^2 / sum(k^2).

    Returns:
        q + `_ROUNDER`, shape (R, N), and scales, shape (R,).
    """
    divisor = _divisor(scale)
    y = rows / divisor
    shift = zeros[:, None] + _ROUNDER
    scratch = np.empty_like(y)
    best_gain = np.full(len(rows), -1, dtype=np.float32)
    best_factor = np.zeros_like(scale)
    best = np.empty_like(y)
    for share in (1.0, *_SHRUNKEN):
        steps = _round_rows(y * np.float32(1 / share), zeros, 15)
        k = steps - shift
        square = _row_sums(np.multiply(k, k, out=scratch)).copy()
        product = _row_sums(np.multiply(y, k, out=scratch))
        factor = product / np.where(square == 0, np.float32(1), square)
        gain = product * factor
        better = gain > best_gain
        best_gain[better], best_factor[better] = gain[better], factor[better]
        np.copyto(best, steps, where=better[:, None])
    return best, divisor[:, 0] * best_factor * (scale != 0)


def _row_sums(values: Float32Array) -> Float32Array:
    """Add up rows in an order of our own, shape (R,); overwrites the values.

    numpy's order depends on how many rows there are.
    """
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0]


def _pack(codes: ByteArray) -> ByteArray:
    """Put two codes into a byte: the second half of the columns into the high nibbles."""
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].copy()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed


def _uncodable(row: Float32Array, name: str, code: RowCode) -> ExportError:
    if not np.isfinite(row).all():
        return ExportError(
            f"{name} holds NaN or Inf",
            expected="finite weights",
            hint="the training diverged or the file is damaged; use another checkpoint",
        )
    return ExportError(
        f"{name} holds {float(row[np.abs(row).argmax()]):.4g}, too large for {code}",
        expected="numbers below 65520" if code == "fp16" else "numbers below 1e38",
        hint="store tables as they are (--quantize none)"
        + (", or with --quantize int8, which takes any range" if code == "fp16" else ""),
    )
