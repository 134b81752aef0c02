"""Rows of batches: take some, join several.

Letters: B batch, F features, L ids per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmt_convert.data.batch import Bag, Batch, FloatArray, IntArray
from dmt_convert.data.value_checks import Rows


def uniform_offsets(num_rows: int, per_row: int) -> IntArray:
    """Offsets of bags that all hold `per_row` ids, shape (B + 1,)."""
    return np.arange(num_rows + 1, dtype=np.int64) * per_row


def take_rows(batch: Batch, rows: Rows) -> Batch:
    """Return some rows of a batch, in the order asked for."""
    return Batch(
        dense=batch.dense[rows],
        feature_names=batch.feature_names,
        bags=tuple(_take_bag(bag, rows) for bag in batch.bags),
        labels=None if batch.labels is None else batch.labels[rows],
        logits=None if batch.logits is None else batch.logits[rows],
    )


def _take_bag(bag: Bag, rows: Rows) -> Bag:
    if isinstance(rows, slice):
        offsets = bag.offsets[rows.start : rows.stop + 1]
        inside: slice | IntArray = slice(int(offsets[0]), int(offsets[-1]))
        offsets = offsets - offsets[0]
    else:
        lengths = np.diff(bag.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        inside = np.repeat(bag.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Bag(
        values=bag.values[inside],
        offsets=offsets,
        weights=None if bag.weights is None else bag.weights[inside],
    )


def join_batches(parts: Sequence[Batch]) -> Batch:
    """Return the rows of several batches of the same features, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return Batch(
        dense=np.concatenate([part.dense for part in parts]),
        feature_names=first.feature_names,
        bags=tuple(_join_bags([part.bags[f] for part in parts]) for f in range(len(first.bags))),
        labels=_join([part.labels for part in parts]),
        logits=_join([part.logits for part in parts]),
    )


def _join_bags(bags: Sequence[Bag]) -> Bag:
    starts = np.cumsum([0, *(len(bag.values) for bag in bags)])
    offsets = [bag.offsets[:-1] + start for bag, start in zip(bags, starts, strict=False)]
    return Bag(
        values=np.concatenate([bag.values for bag in bags]),
        offsets=np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        weights=_join([bag.weights for bag in bags]),
    )


def _join(arrays: Sequence[FloatArray | None]) -> FloatArray | None:
    known = [array for array in arrays if array is not None]
    assert len(known) in (0, len(arrays)), "some parts have this array, some do not"
    return np.concatenate(known) if known else None
