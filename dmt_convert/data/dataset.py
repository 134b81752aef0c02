"""Data sets as blocks of rows: order, shards, resumption, in one place for every format.

A block is what a format reads at once: a parquet row group, some thousand lines, a range of an
array. Shuffling permutes the blocks, and the rows inside each block: memory stays one block,
and the order is a pure function of the seed. Every rank owns a contiguous range of that order,
so it reads only its own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from dmt_convert.arrays import IntArray
from dmt_convert.data.batch import Batch, Rows, join_batches
from dmt_convert.documents import InputRecord
from dmt_convert.errors import ConfigError, DataError

TakeRows = Callable[[Rows], Batch]
"""Gives some rows of one block; rows count from the block's first."""


ColumnOrder = Literal["array", "listed", "file", "fed"]
"""What the order of a data set's columns means. array: they are columns of an array, their names
are made up. listed: `schema.json` lists them in order. file: nothing, they stand as they were
written. fed: they are the model's own inputs, as a probe holds them."""


class BlockSource(Protocol):
    """Where the blocks of a data set come from."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Rows of every block."""

    @property
    def keeps_block_order(self) -> bool:
        """Whether blocks can only be read forward: shuffling then permutes rows inside blocks."""

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Read blocks in the order asked for, one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows of dense inputs and bags of ids, streamed in batches. All readers return one.

    Letters: B batch, D dense inputs, F features.
    """

    path: Path
    """File or directory that was opened."""
    format: str
    """Name of the reader's format."""
    num_dense: int
    """D, number of dense inputs; may be 0."""
    feature_names: tuple[str, ...]
    """Names of the F bags of every batch, in order."""
    names_are_positional: bool
    """Whether the names only count columns (`f0`, `f1`, ...)."""
    has_labels: bool
    """Whether batches carry labels."""
    source: BlockSource
    """The blocks."""
    has_logits: bool = False
    """Whether batches carry the original model's logits (probes)."""
    hash_ids: bool = False
    """Whether ids must be taken modulo the table's rows, as the format's trainer does."""
    feature_order: ColumnOrder = "listed"
    """What the order of `feature_names` means."""
    dense_names: tuple[str, ...] = ()
    """Names of the D dense inputs of every batch; made up unless given."""
    dense_order: ColumnOrder = "array"
    """What the order of the dense inputs means."""
    dense_form: str | None = "stored"
    """In which form dense inputs are fed (`dense_transforms.FORMS`). None if they are the model's
    own inputs (probes)."""
    form_is_stated: bool = False
    """Whether `schema.json` names the form."""
    column_types: Mapping[str, str] = field(default_factory=dict)
    """Name -> type of every column of the files, read or not, if columns have types of their
    own."""
    inputs: InputRecord | None = None
    """How the columns were matched to a model's inputs, once they were."""
    notes: tuple[str, ...] = ()
    """What a user should know of the columns; logged when they are matched to a model's inputs."""

    def __post_init__(self) -> None:
        if not self.dense_names:
            object.__setattr__(
                self, "dense_names", tuple(f"dense[{i}]" for i in range(self.num_dense))
            )

    @property
    def num_rows(self) -> int:
        """Number of rows, over all blocks."""
        return sum(self.source.block_sizes)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold the rows, each once, in order; none if the reader does not say."""
        source: object = self.source
        while hasattr(source, "inner"):
            source = source.inner
        return tuple(dict.fromkeys(getattr(source, "files", ())))

    def lists_file_columns(self, order: Literal["feature_order", "dense_order"]) -> bool:
        """Whether `schema.json` puts columns in order that have names of their own."""
        return bool(self.column_types) and getattr(self, order) == "listed"

    def require_labels(self, hint: str) -> None:
        """Refuse rows without labels, naming what there is instead.

        Args:
            hint: What else one may do.

        Raises:
            DataError: There are none.
        """
        if self.has_labels:
            return
        columns = ", ".join(self.column_types)
        raise DataError(
            f"{self.path} has no labels" + (f"; its columns are {columns}" if columns else ""),
            expected="a column `label` of 0 or 1" if columns else "a label of 0 or 1 for every row",
            hint=f"rename the column of labels to `label`; {hint}" if columns else hint,
        )

    def batches(
        self,
        batch_size: int,
        *,
        start_row: int = 0,
        max_rows: int | None = None,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> RowBatches:
        """Stream this rank's rows.

        The ranks' rows are disjoint and together all rows; their numbers differ by at most one.

        Args:
            batch_size: B, rows per batch; only the last batch may be smaller.
            start_row: Rows of this rank's order to skip (to resume).
            max_rows: The most rows to return, after those skipped; None for all.
            shuffle_seed: Seed of the row order, or None for the order of the files. The shuffle
                is block-wise: the blocks of a data set are shuffled, and the rows inside each.
            rank: Index of this rank.
            world_size: Number of ranks.

        Raises:
            ConfigError: An argument is out of range.
            DataError: A value is not what the format promises.
        """
        _check_arguments(batch_size, start_row, max_rows, shuffle_seed, rank, world_size)
        last = self.num_rows * (rank + 1) // world_size
        first = min(self.num_rows * rank // world_size + start_row, last)
        if max_rows is not None:
            last = min(last, first + max_rows)
        return RowBatches(_iterate(self.source, batch_size, first, last, shuffle_seed))


class RowBatches(Iterator[Batch]):
    """Batches that know which rows of the data set they hold."""

    def __init__(self, numbered: Iterator[tuple[Batch, IntArray]]) -> None:
        self._numbered = numbered
        self.rows: IntArray = np.zeros(0, dtype=np.int64)
        """Row numbers (from 0) in the data set of the batch given last, shape (B,)."""

    def __next__(self) -> Batch:
        batch, self.rows = next(self._numbered)
        return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A range of one block's rows, in the order of the shuffle."""

    block: int
    first: int
    last: int


def _iterate(
    source: BlockSource, batch_size: int, first: int, last: int, seed: int | None
) -> Iterator[tuple[Batch, IntArray]]:
    sizes = source.block_sizes
    shuffle_blocks = seed is not None and not source.keeps_block_order
    pieces = _plan_pieces(sizes, first, last, seed if shuffle_blocks else None)
    block_starts = np.cumsum([0, *sizes])
    batches: list[Batch] = []
    numbers: list[IntArray] = []
    missing = batch_size
    takers = source.read_blocks([piece.block for piece in pieces])
    for piece, take in zip(pieces, takers, strict=True):
        order = row_order(sizes[piece.block], piece.block, seed)
        at = piece.first
        while at < piece.last:
            stop = min(piece.last, at + missing)
            batches.append(take(slice(at, stop) if seed is None else order[at:stop]))
            numbers.append(order[at:stop] + block_starts[piece.block])
            missing -= stop - at
            at = stop
            if not missing:
                yield join_batches(batches), np.concatenate(numbers)
                batches, numbers, missing = [], [], batch_size
    if batches:
        yield join_batches(batches), np.concatenate(numbers)


def _plan_pieces(sizes: Sequence[int], first: int, last: int, seed: int | None) -> list[_Piece]:
    order = np.arange(len(sizes))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    pieces = []
    start = 0
    for block in (int(b) for b in order):
        size = sizes[block]
        low, high = max(first - start, 0), min(last - start, size)
        if low < high:
            pieces.append(_Piece(block=block, first=low, last=high))
        start += size
    return pieces


def row_order(size: int, block: int, seed: int | None) -> IntArray:
    """Order of the rows inside a block, shape (size,)."""
    if seed is None:
        return np.arange(size, dtype=np.int64)
    return np.random.default_rng((seed, block)).permutation(size).astype(np.int64, copy=False)


def _check_arguments(
    batch_size: int,
    start_row: int,
    max_rows: int | None,
    seed: int | None,
    rank: int,
    world_size: int,
) -> None:
    problems = [
        (batch_size < 1, f"a batch size of {batch_size}", "at least 1"),
        (start_row < 0, f"a start row of {start_row}", "at least 0"),
        (max_rows is not None and max_rows < 0, f"at most {max_rows} rows", "at least 0"),
        (seed is not None and seed < 0, f"a shuffle seed of {seed}", "at least 0"),
        (
            not 0 <= rank < world_size,
            f"rank {rank} of {world_size}",
            "a rank from 0 to world size - 1",
        ),
    ]
    for is_wrong, found, expected in problems:
        if is_wrong:
            raise ConfigError(found, expected=expected)


def take_range(dataset: Dataset, first: int, last: int) -> Dataset:
    """Return rows `first` to `last - 1` of a data set, in the order of its files.

    Unlike `start_row` and `max_rows` of `Dataset.batches`, which cut the order after shuffling,
    the range holds the same rows whatever the seed. Row numbers count from `first`.

    Args:
        dataset: What a reader opened.
        first: First row, from 0.
        last: Row after the last.
    """
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
