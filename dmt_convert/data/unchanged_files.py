"""Rows of files that others may write to meanwhile: a change is refused, never mixed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from dmt_convert.data.batch import Batch, Rows
from dmt_convert.data.dataset import BlockSource, Dataset, TakeRows
from dmt_convert.errors import DataError

_PAUSE: Final = 0.05
"""Seconds between two looks: a folder of a thousand files costs a millisecond per look."""

State = tuple[int, int, int, int]
"""Device, inode, size and time of the last change of a file."""


def refuse_changes(dataset: Dataset) -> Dataset:
    """Make a data set refuse files that are written to, cut short or replaced while it is read.

    Headers were read when it was opened; rows are read later, from mapped or reopened files. What
    is read between two looks is looked at again once the last block is through.
    """
    states = {path: _state(path) for path in dataset.files}
    if not states:
        return dataset
    return replace(dataset, source=_WatchedSource(inner=dataset.source, states=states))


@dataclass(frozen=True, slots=True, kw_only=True)
class _WatchedSource:
    """The blocks of another source, from files that must stay as they are."""

    inner: BlockSource
    states: Mapping[Path, State]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """As the source."""
        return self.inner.block_sizes

    @property
    def keeps_block_order(self) -> bool:
        """As the source."""
        return self.inner.keeps_block_order

    @property
    def narrow(self) -> Callable[..., BlockSource] | None:
        """What leaves out columns, if the source can do that."""
        narrow = getattr(self.inner, "narrow", None)
        if narrow is None:
            return None
        return lambda *columns: replace(self, inner=narrow(*columns))

    def read_blocks(self, blocks: Sequence[int]) -> Iterator[TakeRows]:
        """Read blocks in the order asked for, one at a time."""
        look = _Look(self.states)
        look.now()
        for take in self.inner.read_blocks(blocks):
            yield partial(_take, take, look)
        look.now()


class _Look:
    """Compares files with what they were, at most every `_PAUSE` seconds."""

    def __init__(self, states: Mapping[Path, State]) -> None:
        self._states = states
        self._due = 0.0

    def if_due(self) -> None:
        """Compare them unless that was done a moment ago."""
        if time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        """Compare them.

        Raises:
            DataError: One is not what it was.
        """
        for path, state in self._states.items():
            if _state(path) != state:
                raise DataError(
                    f"{path} changed while it was read",
                    expected="files that stay as they are until the command has ended",
                    hint="wait until they are written, or copy them first; then run it again",
                )
        self._due = time.monotonic() + _PAUSE


def _take(take: TakeRows, look: _Look, rows: Rows) -> Batch:
    look.if_due()
    return take(rows)


def _state(path: Path) -> State:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0, 0, 0
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
