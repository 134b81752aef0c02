"""Inputs drawn for a sample without data: as training saw them, as far as the checkpoint tells.

Rows: a row gathers squared gradients whenever a batch looks it up, so an optimizer's accumulator is
nearly proportional to how often that happened: on models trained with Adam the correlation with
the true counts is 0.99 (docs/method.md).

Dense inputs: the gradient of dense_arch's first weight W[h, d] is that of the bias times the input
x_d. So the accumulators of squared gradients, v(W[h, d]) / v(b[h]), estimate E[x_d^2] (with the
rows weighted by their gradient).

Letters: n rows, D dense inputs, h outputs of the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.arrays import BoolArray, Float32Array, Float64Array, IntArray
from dmt_convert.checkpoint import (
    ITEM_BYTES,
    LARGEST,
    TensorInfo,
    gather_rows,
    read_tensor,
    resolve_pieces,
    stream_tensor,
    to_fp32,
)
from dmt_convert.families import FlatModelInfo, read_initial_value, subtract_initial

_LIVE: Final = 1e-3
_CONSTANT: Final = 1e-3
_ROUNDED: Final = 1e-2
_OVER_INITIAL: Final = 0.01
_LARGEST: Final = 1e30
_MAX_CANDIDATES: Final = 8_192
_HEAD_ROWS: Final = 8_192
_RUN_ROWS: Final = 16
_SCANNED_BYTES: Final = 256 << 20
_KEPT_ROWS: Final = 8 << 20


def draw_rows(
    rows: int,
    state: TensorInfo | None,
    count: int,
    rng: np.random.Generator,
    *,
    initial: float = 0.0,
) -> IntArray:
    """Draw row ids of one table, with repetition.

    Args:
        rows: Rows of the table.
        state: Its optimizer accumulator, shape (rows,) or (rows, N), in proportion to which rows
            are drawn. None: uniformly.
        count: Number of ids.
        rng: Source of randomness.
        initial: Value of the accumulator before training.
    """
    drawn = None
    # values beyond float32 become infinite, and do not count as weights
    with np.errstate(over="ignore", invalid="ignore"):
        if state is not None and rows > _MAX_CANDIDATES + _HEAD_ROWS and _may_scan(state):
            drawn = _draw_scanning(state, count, rng, initial)
        elif state is not None:
            drawn = _draw_candidates(rows, state, count, rng, initial)
    return rng.choice(_spread_rows(0, rows, rng), size=count) if drawn is None else drawn


def _draw_candidates(
    rows: int, state: TensorInfo, count: int, rng: np.random.Generator, initial: float
) -> IntArray | None:
    """Draw among the first rows and runs of the others; None if all weights are zero.

    Tables are often sorted by frequency, so the head of the table is read whole. Every row that is
    read behind it stands for an equal share of the rows that are not.
    """
    head = np.arange(min(rows, _HEAD_ROWS), dtype=np.int64)
    tail = _spread_rows(len(head), rows, rng)
    candidates = np.concatenate([head, tail])
    weight = _weights(gather_rows(state, candidates), state.dtype, initial)
    weight[len(head) :] *= (rows - len(head)) / max(1, len(tail))
    if weight.sum() <= 0:
        return None
    return rng.choice(candidates, size=count, p=weight / weight.sum())


def _draw_scanning(
    state: TensorInfo, count: int, rng: np.random.Generator, initial: float
) -> IntArray | None:
    """Draw by reading the whole accumulator, of long tables twice; None as above."""
    kept = [*_chunks(state, initial)] if state.shape[0] <= _KEPT_ROWS else None
    sums = np.array([chunk.sum() for chunk in kept or _chunks(state, initial)])
    if sums.sum() <= 0:
        return None
    chosen = rng.choice(len(sums), size=count, p=sums / sums.sum())
    wanted = np.bincount(chosen, minlength=len(sums))
    drawn, begin = [np.empty(0, dtype=np.int64)], 0
    for number, chunk in zip(wanted, kept or _chunks(state, initial), strict=True):
        if number:
            drawn.append(begin + rng.choice(len(chunk), size=number, p=chunk / chunk.sum()))
        begin += len(chunk)
    return rng.permutation(np.concatenate(drawn))


def _chunks(state: TensorInfo, initial: float) -> Iterator[Float64Array]:
    """Yield the rows' weights, some megabytes of the accumulator at a time."""
    row_bytes = state.nbytes // state.shape[0]
    rest = np.empty(0, dtype=np.uint8)
    for raw in stream_tensor(state):
        rest = np.concatenate([rest, raw])
        whole = rest[: len(rest) - len(rest) % row_bytes].reshape(-1, row_bytes)
        rest = rest[whole.size :]
        if len(whole):
            yield _weights(to_fp32(whole, state.dtype), state.dtype, initial)


def _weights(values: Float32Array, dtype: str, initial: float) -> Float64Array:
    """Average the columns of every row; a row whose accumulator is damaged weighs nothing."""
    mean: Float64Array = values.mean(axis=1, dtype=np.float64)
    sound = np.isfinite(mean) & (values.min(axis=1) >= 0) & (mean <= LARGEST)
    return np.where(sound, subtract_initial(mean, dtype, initial), 0.0)


def _may_scan(state: TensorInfo) -> bool:
    """Tell whether the whole accumulator is read quickly; a sliced view lies in a longer file."""
    extents = [
        1 + sum((n - 1) * stride for n, stride in zip(part.sizes, part.strides, strict=True))
        for part in resolve_pieces(state)
        if part.strides is not None
    ]
    return max(state.nbytes, sum(extents) * ITEM_BYTES[state.dtype]) <= _SCANNED_BYTES


def _spread_rows(begin: int, end: int, rng: np.random.Generator) -> IntArray:
    """Choose rows all over a range: all of a short one, short runs of a long one.

    A disk reads a run as fast as one row, and ids that are neighbours have nothing in common in
    hashed or frequency-sorted tables, so runs cost little in variety.
    """
    if end - begin <= _MAX_CANDIDATES:
        return np.arange(begin, end, dtype=np.int64)
    starts = rng.integers(end - begin, size=_MAX_CANDIDATES // _RUN_ROWS)
    # a run that reaches the end goes on at the beginning: all rows are as likely
    runs = (starts[:, None] + np.arange(_RUN_ROWS, dtype=np.int64)) % (end - begin)
    return begin + np.unique(runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseScale:
    """The size of the dense inputs, estimated from an optimizer's state."""

    rms: Float64Array
    """Root of E[x_d^2], shape (D,)."""
    constant: BoolArray
    """Whether the input never varied, shape (D,)."""


def draw_dense(info: FlatModelInfo, count: int, rng: np.random.Generator) -> Float32Array:
    """Draw dense inputs, each on its own.

    Click models are fed non-negative inputs, mostly log(1 + count). If the optimizer state tells
    their size, they are drawn uniformly from [0, sqrt(3) rms]: bounded, so that no fit leans on
    rare large values that are only assumed. Otherwise they are log(1 + x) of log-normal counts.

    Returns:
        Inputs, shape (n, D), float32.
    """
    width = info.spec.num_dense
    scale = estimate_scale(info)
    if scale is None:
        counts = rng.lognormal(mean=0.5, sigma=1.5, size=(count, width))
        return np.log1p(counts).astype(np.float32)
    drawn = rng.random((count, width)) * np.sqrt(3.0)
    drawn[:, scale.constant] = 1.0
    scaled: Float32Array = (drawn * scale.rms).astype(np.float32)
    return scaled


def estimate_scale(info: FlatModelInfo) -> DenseScale | None:
    """Estimate the size of every dense input; None if the optimizer state does not tell."""
    states = [info.optimizer_state.get(f"dense_arch.0.{kind}") for kind in ("weight", "bias")]
    if states[0] is None or states[1] is None:
        return None
    initial = read_initial_value(info.checkpoint, states[1])
    weight, bias = (_read_gathered(state, initial) for state in states if state is not None)
    sound = all(np.isfinite(v).all() and v.min(initial=0.0) >= 0 for v in (weight, bias))
    # a sum that is small beside its initial value was lost in rounding
    if not sound or bias.max(initial=0.0) <= _OVER_INITIAL * initial:
        return None
    live = bias > max(_LIVE * float(np.median(bias[bias > 0])), _OVER_INITIAL * initial)
    ratio = weight[live] / bias[live, None]
    square = np.median(ratio, axis=0)
    # a constant input scales all gradients alike; one that varies meets each unit in other rows
    spread = np.abs(ratio - square).max(axis=0, initial=0.0)
    rounding = _ROUNDED if states[0].dtype in ("fp16", "bf16") else _CONSTANT
    alike = (spread <= rounding * square) & (len(ratio) > 1)
    return None if square.max() > _LARGEST else DenseScale(rms=np.sqrt(square), constant=alike)


def _read_gathered(state: TensorInfo, initial: float) -> Float64Array:
    values = np.asarray(read_tensor(state), dtype=np.float64)
    return subtract_initial(values, state.dtype, initial)
