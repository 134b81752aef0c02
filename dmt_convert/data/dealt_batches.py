"""Global batches dealt to ranks: what a step trains on does not depend on how many ranks there are.

`Dataset.batches` gives every rank a range of the rows, so that it opens only its own blocks. Here
every rank opens all blocks, and takes of every global batch its own rows alone. So training on
eight ranks sees what training on one sees, and can be continued on four.

Letters: G rows of a global batch, W ranks, B = ceil(G / W) rows of one rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dmt_convert.arrays import IntArray
from dmt_convert.data.adapter import adapt_batches
from dmt_convert.data.batch import Batch, join_batches, take_rows
from dmt_convert.data.dataset import Dataset, RowBatches, row_order
from dmt_convert.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of a global batch. All ranks' parts have the same number of rows."""

    batch: Batch
    """Its rows, then copies of the last one if the global batch does not divide evenly."""
    rows: IntArray
    """Their row numbers (from 0) in the data set, shape (B,)."""
    counted: int
    """Rows that count; those after them are copies."""
    total: int
    """Rows of the global batch, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Rows of the shuffled order: one rank's part of a global batch."""

    first: int
    last: int
    counted: int
    size: int
    total: int


def deal_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    shuffle_seed: int | None = None,
    start_batch: int = 0,
) -> Iterator[Share]:
    """Yield this rank's part of every global batch of one pass.

    Args:
        dataset: The rows.
        batch_size: G; only the last global batch may be smaller.
        rank: Index of this rank.
        world_size: W.
        shuffle_seed: Seed of the order, as for `Dataset.batches`; the order is the same.
        start_batch: Global batches to skip (to resume).
    """
    assert 0 <= rank < world_size and batch_size >= 1
    num_batches = -(-dataset.num_rows // batch_size)
    cuts = [
        _cut(dataset.num_rows, batch_size, number, rank, world_size)
        for number in range(start_batch, num_batches)
    ]
    yield from _read(dataset, cuts, shuffle_seed)


def _cut(num_rows: int, batch_size: int, number: int, rank: int, world_size: int) -> _Cut:
    begin = number * batch_size
    total = min(batch_size, num_rows - begin)
    size = -(-total // world_size)
    first = min(rank * size, total - 1)
    last = max(first + 1, min((rank + 1) * size, total))
    counted = max(0, min(size, total - rank * size))
    return _Cut(first=begin + first, last=begin + last, counted=counted, size=size, total=total)


def _read(dataset: Dataset, cuts: list[_Cut], seed: int | None) -> Iterator[Share]:
    source = dataset.source
    sizes = source.block_sizes
    order = np.arange(len(sizes))
    if seed is not None and not source.keeps_block_order:
        order = np.random.default_rng(seed).permutation(order)
    ends = np.cumsum([sizes[block] for block in order])
    block_starts = np.cumsum([0, *sizes])
    places = [_places(ends, cut) for cut in cuts]
    needed = list(dict.fromkeys(place for found in places for place in found))
    takers = zip(needed, source.read_blocks([int(order[p]) for p in needed]), strict=True)
    at, take, rows = -1, None, np.zeros(0, dtype=np.int64)
    for cut, found in zip(cuts, places, strict=True):
        parts, numbers = [], []
        for place in found:
            block = int(order[place])
            while at != place:
                at, take = next(takers)
                rows = row_order(sizes[block], block, seed)
            assert take is not None
            start = int(ends[place]) - sizes[block]
            inside = slice(max(cut.first - start, 0), min(cut.last - start, sizes[block]))
            parts.append(take(inside if seed is None else rows[inside]))
            numbers.append(rows[inside] + block_starts[block])
        yield _share(join_batches(parts), np.concatenate(numbers), cut)


def _places(ends: IntArray, cut: _Cut) -> range:
    """Places in the order of blocks that hold rows of a part."""
    first, last = np.searchsorted(ends, [cut.first, cut.last - 1], side="right")
    return range(int(first), int(last) + 1)


def _share(batch: Batch, rows: IntArray, cut: _Cut) -> Share:
    missing = cut.size - batch.num_rows
    if missing:
        padded = np.concatenate([np.arange(len(rows)), np.full(missing, len(rows) - 1)])
        batch, rows = take_rows(batch, padded), rows[padded]
    return Share(batch=batch, rows=rows, counted=cut.counted, total=cut.total)


def adapt_shares(dataset: Dataset, spec: ModelSpec, shares: Iterable[Share]) -> Iterator[Share]:
    """Turn shares of a data set into shares of the model's features, as `adapt_batches` does.

    Args:
        dataset: The data set that the shares come from.
        spec: The model.
        shares: What `deal_batches` gives.

    Raises:
        DataError: The data do not fit the model (at once), or an id is out of its table's range
            (as the share comes).
    """
    pending: deque[Share] = deque()

    def numbered() -> Iterator[tuple[Batch, IntArray]]:
        for share in shares:
            pending.append(share)
            yield share.batch, share.rows

    adapted = adapt_batches(dataset, spec, RowBatches(numbered()))
    return (replace(pending.popleft(), batch=batch) for batch in adapted)
