"""Values that are absurd as weights: what a flipped bit of an exponent leaves behind.

A bit of the exponent multiplies a float32 by 2^16, 2^32, 2^64 or 2^128. What is refused:

- a magnitude beyond 1e18, whose square float32 hardly holds;
- a magnitude beyond 1,000 that is more than a million times the root mean square (RMS) of all
  smaller values around it that are not zero. One value in a thousand may be such an outlier, 64 at
  most, so that several do not hide each other. float16 has no more than 65,504, so that 2^15 times
  the RMS are enough there.

The values around it are the tensor, or the 8 MiB of it that are read at a time. The RMS
follows heavy tails: of n values from one distribution the largest is hardly more than sqrt(n) times
the RMS of the rest. Zeros do not count, so that one trained row among zeros is no outlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import AnyArray, FloatArray
from dmt_convert.checkpoint.flat_checkpoint import ByteRows
from dmt_convert.checkpoint.tensor_bytes import to_fp32
from dmt_convert.errors import CheckpointError

LARGEST: Final = 1e18
"""No weight, and no sum of squared gradients, is beyond it."""
OUTLIERS_HINT: Final = (
    "a bit of the file has probably flipped: copy the checkpoint again, or use another one; "
    "convert, partition, score, evaluate and verify take the value as it is with --outliers accept"
)
_FLOOR: Final = 1e3
_RATIO: Final = 1e6
_RATIO_FP16: Final = 2.0**15
_MOST: Final = 64
_SHARE: Final = 1000
_BLOCK_ELEMENTS: Final = 1 << 21
"""Elements of a tensor that are looked at together."""
_STATISTICS: Final = (".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of names of tensors that hold statistics of the inputs, which may have any scale."""
_BITS: Final[dict[str, tuple[str, str, int]]] = {
    dtype: (signed, unsigned, int(np.array(_FLOOR, dtype=kind).view(unsigned)))
    for dtype, kind, signed, unsigned in (
        ("fp64", "<f8", "<i8", "<u8"),
        ("fp32", "<f4", "<i4", "<u4"),
        ("fp16", "<f2", "<i2", "<u2"),
    )
}
# bf16 is the upper half of fp32
_BITS["bf16"] = ("<i2", "<u2", _BITS["fp32"][2] >> 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """The largest of the absurd values among some."""

    index: int
    """Where it is, in row-major order."""
    value: float
    """What it is."""
    rms: float | None
    """Root mean square of the others that are not zero; None if there are none."""
    count: int
    """How many such values there are."""

    def describe(self) -> str:
        """Say what it is beside the others."""
        others = (
            "all others are 0" if self.rms is None else f"the RMS of the others is {self.rms:.3g}"
        )
        more = "" if self.count == 1 else f"; {self.count} such values"
        return f"{self.value:.6g} ({others}{more})"


def find_outlier(
    values: AnyArray, *, ratio: float = _RATIO, floor: float = _FLOOR
) -> Outlier | None:
    """Find the largest absurd value, by the rule above.

    Args:
        values: Finite numbers of any shape.
        ratio: How many times the RMS of the smaller values it must be.
        floor: Magnitude up to which nothing is absurd.
    """
    flat = values.reshape(-1)
    if not flat.size or max(float(flat.max()), -float(flat.min())) <= floor:
        return None
    size = np.abs(flat.astype(np.float64))
    most = min(max(1, len(size) // _SHARE), _MOST, len(size))
    # those beyond what is ever right do not have to be few
    most = max(most, int(np.count_nonzero(size > LARGEST)))
    order = np.argpartition(size, len(size) - most)
    top = order[len(size) - most :]
    top = top[np.argsort(-size[top], kind="stable")]
    rest = size[order[: len(size) - most]]
    squares, counts = np.square(rest).sum(), np.count_nonzero(rest)
    found = None
    for place in range(most - 1, -1, -1):
        value = size[top[place]]
        rms = float(np.sqrt(squares / counts)) if counts else None
        beyond = rms is not None and value > max(floor, ratio * rms)
        if found is None and (beyond or value > LARGEST):
            found = Outlier(index=int(top[0]), value=float(flat[top[0]]), rms=rms, count=place + 1)
        squares, counts = squares + value**2, counts + (value > 0)
    return found


def find_outlier_in_bytes(chunk: ByteRows, dtype: str) -> Outlier | None:
    """Find the largest absurd value among the bytes of a tensor.

    Args:
        chunk: Whole elements, all finite.
        dtype: Their type; whole numbers have no outliers.
    """
    if dtype not in _BITS or not chunk.size:
        return None
    signed, unsigned, floor = _BITS[dtype]
    # as whole numbers, floats of one sign are in the order of their magnitudes
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    if int(chunk.view(signed).max()) <= floor and int(chunk.view(unsigned).max()) <= floor + sign:
        return None
    values: FloatArray | Any
    values = chunk.view("<f8") if dtype == "fp64" else to_fp32(chunk.reshape(1, -1), dtype)
    return find_outlier(values, ratio=_RATIO_FP16 if dtype == "fp16" else _RATIO)


def check_outliers(array: AnyArray, origin: str) -> None:
    """Refuse a weight that holds an absurd value.

    Args:
        array: Numbers.
        origin: What the checkpoint calls them. Statistics of inputs may have any scale.

    Raises:
        CheckpointError: It does.
    """
    if array.dtype.kind != "f" or origin.endswith(_STATISTICS):
        return
    ratio = _RATIO_FP16 if array.dtype == np.float16 else _RATIO
    flat = array.reshape(-1)
    step = -(-flat.size // max(1, -(-flat.size // _BLOCK_ELEMENTS)))
    for first in range(0, flat.size, max(1, step)):
        outlier = find_outlier(flat[first : first + step], ratio=ratio)
        if outlier is not None:
            raise outlier_error(origin, outlier, array.shape, first=first)


def outlier_error(
    origin: str, outlier: Outlier, shape: tuple[int, ...], *, first: int = 0
) -> CheckpointError:
    """Say which element of a tensor is absurd.

    Args:
        origin: What to call the tensor.
        outlier: What was found.
        shape: Shape of the whole tensor.
        first: Elements of the tensor in front of those that were looked at.
    """
    place = [int(i) for i in np.unravel_index(first + outlier.index, shape)] if shape else []
    where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"[{str(place)[1:-1]}]"
    return CheckpointError(
        f"{origin}, {where}: {outlier.describe()}",
        expected="weights of one scale",
        hint=OUTLIERS_HINT,
    )
