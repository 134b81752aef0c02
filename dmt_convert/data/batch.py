"""A batch of rows, as numpy arrays: dense inputs and bags of ids. Take some rows, join several.

Letters: B batch, D dense inputs, F features, L ids per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmt_convert.arrays import Float32Array, IntArray

Rows = slice | IntArray
"""Which rows: a slice with start and stop, or row numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """The ids of one feature for a whole batch, in the CSR form of `nn.EmbeddingBag`."""

    values: IntArray
    """Ids of all rows one after the other, shape (nnz,), int64."""
    offsets: IntArray
    """Where every row's ids begin, then nnz: shape (B + 1,), int64."""
    weights: Float32Array | None = None
    """One weight per id, shape (nnz,), float32, or None for unweighted bags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of input."""

    dense: Float32Array
    """Dense inputs as fed to the model, shape (B, D), float32; D may be 0."""
    feature_names: tuple[str, ...]
    """Names of the bags."""
    bags: tuple[Bag, ...]
    """One per feature, in the order of `feature_names`."""
    labels: Float32Array | None = None
    """0 or 1 per row, shape (B,), float32, if known."""
    logits: Float32Array | None = None
    """The original model's logits, shape (B,), float32, if the data holds them (probes)."""

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense)


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


def _join(arrays: Sequence[Float32Array | None]) -> Float32Array | None:
    known = [array for array in arrays if array is not None]
    assert len(known) in (0, len(arrays)), "only some parts have this array"
    return np.concatenate(known) if known else None
