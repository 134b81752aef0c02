"""Which rows of a table a sampled input looks up: as often as training did, where that is known.

A row gathers squared gradients whenever a batch looks it up, so an optimizer's accumulator is
nearly proportional to how often that happened: on models trained with Adam the correlation with
the true counts is 0.99 (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import (
    ITEM_BYTES,
    TensorInfo,
    gather_rows,
    resolve_pieces,
    stream_tensor,
    to_fp32,
)
from dmt_convert.families import subtract_initial

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]
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
) -> Ids:
    """Draw row ids of one table, with repetition.

    Args:
        rows: Rows of the table.
        state: Its optimizer accumulator, shape (rows,) or (rows, N): rows are drawn in
            proportion to what it gathered. None: uniformly.
        count: How many ids.
        rng: Source of randomness.
        initial: What the accumulator held before training.
    """
    drawn = None
    # what no float32 holds becomes infinite, and is no weight
    with np.errstate(over="ignore", invalid="ignore"):
        if state is not None and rows > _MAX_CANDIDATES + _HEAD_ROWS and _may_scan(state):
            drawn = _draw_scanning(state, count, rng, initial)
        elif state is not None:
            drawn = _draw_candidates(rows, state, count, rng, initial)
    return rng.choice(_spread_rows(0, rows, rng), size=count) if drawn is None else drawn


def _draw_candidates(
    rows: int, state: TensorInfo, count: int, rng: np.random.Generator, initial: float
) -> Ids | None:
    """Draw among the first rows and runs of the others; None where the weights tell nothing.

    Tables are often sorted by frequency, so the head of the table is looked at whole; every row
    that is looked at behind it stands for as many others as there are to one.
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
) -> Ids | None:
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


def _chunks(state: TensorInfo, initial: float) -> Iterator[Array]:
    """Yield the rows' weights, some megabytes of the accumulator at a time."""
    row_bytes = state.nbytes // state.shape[0]
    rest = np.empty(0, dtype=np.uint8)
    for raw in stream_tensor(state):
        rest = np.concatenate([rest, raw])
        whole = rest[: len(rest) - len(rest) % row_bytes].reshape(-1, row_bytes)
        rest = rest[whole.size :]
        if len(whole):
            yield _weights(to_fp32(whole, state.dtype), state.dtype, initial)


def _weights(values: npt.NDArray[np.float32], dtype: str, initial: float) -> Array:
    """Average what the columns gathered; a row whose accumulator is damaged weighs nothing."""
    mean: Array = values.mean(axis=1, dtype=np.float64)
    sound = np.isfinite(mean) & (values.min(axis=1) >= 0)
    return np.where(sound, subtract_initial(mean, dtype, initial), 0.0)


def _may_scan(state: TensorInfo) -> bool:
    """Tell whether the whole accumulator is soon read: a sliced view lies in a longer file."""
    extents = [
        1 + sum((n - 1) * stride for n, stride in zip(part.sizes, part.strides, strict=True))
        for part in resolve_pieces(state)
        if part.strides is not None
    ]
    return max(state.nbytes, sum(extents) * ITEM_BYTES[state.dtype]) <= _SCANNED_BYTES


def _spread_rows(begin: int, end: int, rng: np.random.Generator) -> Ids:
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
