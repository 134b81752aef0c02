"""A range of a data set's rows, as a data set: to hold rows out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmt_convert.data.batch import Batch
from dmt_convert.data.dataset import Dataset
from dmt_convert.data.row_blocks import BlockDataset, BlockSource, TakeRows
from dmt_convert.data.value_checks import Rows


def take_range(dataset: Dataset, first: int, last: int) -> BlockDataset:
    """Return rows `first` to `last - 1` of a data set, in the order of its files.

    Unlike `start_row` and `max_rows` of `Dataset.batches`, which cut the order after shuffling,
    the range holds the same rows whatever the seed. Row numbers count from `first`.

    Args:
        dataset: What a reader opened.
        first: First row, from 0.
        last: Row after the last.
    """
    assert isinstance(dataset, BlockDataset)
    assert 0 <= first <= last <= dataset.num_rows
    return replace(dataset, source=_RangeSource(inner=dataset.source, first=first, last=last))


@dataclass(frozen=True, slots=True, kw_only=True)
class _RangeSource:
    """The blocks of another source that overlap a range, cut to it."""

    inner: BlockSource
    first: int
    last: int

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every block."""
        return tuple(end - begin for _, begin, end in self._cuts())

    @property
    def keeps_block_order(self) -> bool:
        """As the source."""
        return self.inner.keeps_block_order

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Read blocks in the order asked for, one at a time."""
        cuts = [self._cuts()[block] for block in blocks]
        takers = self.inner.read_blocks([block for block, _, _ in cuts])
        for (_, begin, _), take in zip(cuts, takers, strict=True):
            yield _shift(take, begin)

    def _cuts(self) -> list[tuple[int, int, int]]:
        """Block of the source, and the rows of it that lie in the range."""
        starts = np.cumsum([0, *self.inner.block_sizes])
        cuts = []
        for block, size in enumerate(self.inner.block_sizes):
            begin = max(self.first - int(starts[block]), 0)
            end = min(self.last - int(starts[block]), size)
            if begin < end:
                cuts.append((block, begin, end))
        return cuts


def _shift(take: TakeRows, begin: int) -> TakeRows:
    def taken(rows: Rows) -> Batch:
        if isinstance(rows, slice):
            return take(slice(rows.start + begin, rows.stop + begin))
        return take(rows + begin)

    return taken
