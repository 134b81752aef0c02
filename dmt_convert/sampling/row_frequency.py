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
    Piece,
    TensorInfo,
    gather_rows,
    resolve_segments,
    stream_tensor,
    to_fp32,
)

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]
_MAX_CANDIDATES: Final = 8_192
_HEAD_ROWS: Final = 8_192
_RUN_ROWS: Final = 16
_SCANNED_BYTES: Final = 256 << 20


def draw_rows(rows: int, state: TensorInfo | None, count: int, rng: np.random.Generator) -> Ids:
    """Draw row ids of one table, with repetition.

    Args:
        rows: Rows of the table.
        state: Its optimizer accumulator, shape (rows,) or (rows, N): rows are drawn in
            proportion to it. None: uniformly.
        count: How many ids.
        rng: Source of randomness.
    """
    if state is None:
        return rng.choice(_spread_rows(0, rows, rng), size=count)
    if rows > _MAX_CANDIDATES + _HEAD_ROWS and _is_vector(state) and state.nbytes <= _SCANNED_BYTES:
        drawn = _draw_scanning(state, count, rng)
    else:
        drawn = _draw_candidates(rows, state, count, rng)
    return rng.choice(_spread_rows(0, rows, rng), size=count) if drawn is None else drawn


def _draw_candidates(
    rows: int, state: TensorInfo, count: int, rng: np.random.Generator
) -> Ids | None:
    """Draw among the first rows and runs of the others; None where the weights tell nothing.

    Tables are often sorted by frequency, so the head of the table is looked at whole; every row
    that is looked at behind it stands for as many others as there are to one.
    """
    table = state if len(state.shape) == 2 else _as_column(state)
    head = np.arange(min(rows, _HEAD_ROWS), dtype=np.int64)
    tail = _spread_rows(len(head), rows, rng)
    candidates = np.concatenate([head, tail])
    weight = _weights(gather_rows(table, candidates).mean(axis=1, dtype=np.float64))
    weight[len(head) :] *= (rows - len(head)) / max(1, len(tail))
    if weight.sum() <= 0:
        return None
    return rng.choice(candidates, size=count, p=weight / weight.sum())


def _draw_scanning(state: TensorInfo, count: int, rng: np.random.Generator) -> Ids | None:
    """Draw by reading one number per row of the whole table, twice; None as above."""
    sums = np.array([chunk.sum() for chunk in _chunks(state)])
    if sums.sum() <= 0:
        return None
    wanted = rng.multinomial(count, sums / sums.sum())
    drawn, begin = [], 0
    for number, chunk in zip(wanted, _chunks(state), strict=True):
        if number:
            drawn.append(begin + rng.choice(len(chunk), size=number, p=chunk / chunk.sum()))
        begin += len(chunk)
    return rng.permutation(np.concatenate(drawn)).astype(np.int64)


def _chunks(state: TensorInfo) -> Iterator[Array]:
    """Yield the weights of a vector, some megabytes at a time."""
    for raw in stream_tensor(state):
        yield _weights(to_fp32(raw.reshape(1, -1), state.dtype).reshape(-1).astype(np.float64))


def _weights(values: Array) -> Array:
    """Replace what is no weight (a damaged accumulator) by zero."""
    weights: Array = np.where(np.isfinite(values), np.maximum(values, 0.0), 0.0)
    return weights


def _is_vector(state: TensorInfo) -> bool:
    return len(state.shape) == 1 or state.shape[1] == 1


def _spread_rows(begin: int, end: int, rng: np.random.Generator) -> Ids:
    """Choose rows all over a range: all of a short one, short runs of a long one.

    A disk reads a run as fast as one row, and ids that are neighbours have nothing in common in
    hashed or frequency-sorted tables, so runs cost little in variety.
    """
    if end - begin <= _MAX_CANDIDATES:
        return np.arange(begin, end, dtype=np.int64)
    starts = rng.integers(begin, end - _RUN_ROWS + 1, size=_MAX_CANDIDATES // _RUN_ROWS)
    return np.unique(starts[:, None] + np.arange(_RUN_ROWS, dtype=np.int64))


def _as_column(info: TensorInfo) -> TensorInfo:
    """Describe a vector as a table of one column, so that single elements can be gathered."""
    pieces = tuple(
        Piece(
            path=segment.path,
            offset=segment.offset,
            length=segment.sizes[0] * ITEM_BYTES[info.dtype],
            starts=(*segment.starts, 0),
            sizes=(*segment.sizes, 1),
            strides=None if segment.strides is None else (*segment.strides, 1),
        )
        for segment in resolve_segments(info)
    )
    return TensorInfo(
        name=info.name,
        container=info.container,
        dtype=info.dtype,
        shape=(*info.shape, 1),
        pieces=pieces,
    )
