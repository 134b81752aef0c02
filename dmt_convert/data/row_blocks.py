"""Data sets as blocks of rows: order, shards, resumption, in one place for every format.

A block is what a format reads at once: a parquet row group, some thousand lines, a range of an
array. Shuffling permutes the blocks, and the rows inside each block: memory stays one block,
and the order is a pure function of the seed. Every rank owns a contiguous range of that order,
so it reads only its own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dmt_convert.data.batch import Batch, IntArray
from dmt_convert.data.row_selection import join_batches
from dmt_convert.data.value_checks import Rows
from dmt_convert.errors import ConfigError

TakeRows = Callable[[Rows], Batch]
"""Gives some rows of one block; rows count from the block's first."""


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
class BlockDataset:
    """A `Dataset` over blocks."""

    path: Path
    """File or directory that was opened."""
    format: str
    """Name of the reader's format."""
    num_dense: int
    """Number of dense inputs."""
    feature_names: tuple[str, ...]
    """Names of the bags."""
    names_are_positional: bool
    """Whether the names only count columns."""
    has_labels: bool
    """Whether batches carry labels."""
    source: BlockSource
    """The blocks."""
    has_logits: bool = False
    """Whether batches carry logits."""
    hash_ids: bool = False
    """Whether ids are to be taken modulo the table's rows."""

    @property
    def num_rows(self) -> int:
        """Number of rows, over all blocks."""
        return sum(self.source.block_sizes)

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
        """Stream this rank's rows (see `Dataset.batches`)."""
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
            raise ConfigError(found, expected=expected, hint="change the option")
