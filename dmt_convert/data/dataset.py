"""What a data set is, and what a reader of data sets is.

Letters: B batch, D dense inputs, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from dmt_convert.data.batch import Batch


class Dataset(Protocol):
    """Rows of dense inputs and bags of ids, streamed in batches."""

    @property
    def path(self) -> Path:
        """File or directory that was opened."""

    @property
    def format(self) -> str:
        """Name of the reader's format."""

    @property
    def num_rows(self) -> int:
        """Number of rows, over all files."""

    @property
    def num_dense(self) -> int:
        """D, number of dense inputs; may be 0."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the F bags of every batch, in order."""

    @property
    def names_are_positional(self) -> bool:
        """Whether the names only count columns (`f0`, `f1`, ...)."""

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""

    @property
    def has_logits(self) -> bool:
        """Whether batches carry the original model's logits (probes)."""

    @property
    def hash_ids(self) -> bool:
        """Whether ids are to be taken modulo the table's rows, as the format's trainer does."""

    def batches(
        self,
        batch_size: int,
        *,
        start_row: int = 0,
        max_rows: int | None = None,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Stream this rank's rows.

        The ranks' rows are disjoint and together all rows; their numbers differ by at most one.

        Args:
            batch_size: B, rows per batch; only the last batch may be smaller.
            start_row: Rows of this rank's order to skip (to resume).
            max_rows: Rows to give at most, after those skipped; None for all.
            shuffle_seed: Seed of the row order, or None for the order of the files. The
                shuffle is block-wise: the blocks of a data set are shuffled, and the rows
                inside each block.
            rank: Index of this rank.
            world_size: Number of ranks.

        Raises:
            ConfigError: An argument is out of range.
            DataError: A value is not what the format promises.
        """


class DataReader(Protocol):
    """Reader of one format."""

    format: str
    """Name of the format, as messages call it."""

    def can_read(self, path: Path) -> bool:
        """Tell by names and magic bytes whether the path holds this format; never raises."""

    def open(self, path: Path) -> Dataset:
        """Open a data set: headers only, where the format has any.

        Raises:
            DataError: The data are not what the format promises.
        """
