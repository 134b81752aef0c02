"""Copy many short ranges out of a file: those that lie close together in one read.

Letters: n ranges.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from dmt_convert.arrays import IntArray
from dmt_convert.checkpoint.flat_checkpoint import ByteRows
from dmt_convert.checkpoint.held_files import HeldFile

_GAP_BYTES: Final = 16 << 10
"""Up to here, reading what lies between two ranges costs less than a call of its own."""
_BLOCK_BYTES: Final = 8 << 20
"""About how much is read at a time; all its reads are asked for at once."""
_TRIES: Final = 16
"""Reads of a block that are tried without waiting, before it is taken to be on the disk only."""


def read_ranges(file: HeldFile, begins: IntArray, width: int) -> ByteRows:
    """Copy ranges of equal length out of a file.

    Args:
        file: The file.
        begins: Where they begin, in bytes, shape (n,), ascending.
        width: Bytes of each, at least 1.

    Returns:
        Their bytes, shape (n, width).
    """
    out = np.empty((len(begins), width), dtype=np.uint8)
    if not len(begins):
        return out
    taken = np.minimum(np.diff(begins, prepend=begins[:1]), width + _GAP_BYTES)
    block = np.cumsum(taken) // _BLOCK_BYTES
    ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(begins)]
    first = 0
    with file.open() as descriptor:
        for end in ends:
            _read_block(file, descriptor, begins[first:end], out[first:end])
            first = end
    return out


def _read_block(file: HeldFile, descriptor: int, begins: IntArray, out: ByteRows) -> None:
    width = out.shape[1]
    breaks = np.flatnonzero(np.diff(begins) > width + _GAP_BYTES) + 1
    counts = np.diff(breaks, prepend=0, append=len(begins))
    firsts = begins[np.concatenate([[0], breaks])]
    lengths = begins[np.cumsum(counts) - 1] + width - firsts
    places = np.cumsum(lengths) - lengths
    buffer = np.empty(int(lengths.sum()), dtype=np.uint8)
    reads = zip(firsts.tolist(), places.tolist(), lengths.tolist(), strict=True)
    views = [(offset, buffer.data[at : at + length]) for offset, at, length in reads]
    missed = _read_cached(descriptor, views)
    # a disk serves many requests faster than one by one: ask for all before waiting for any
    for offset, view in missed:
        os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_WILLNEED)
    for offset, view in missed:
        file.read_into(descriptor, offset, view)
    index = begins + np.repeat(places - firsts, counts)
    out[:] = np.lib.stride_tricks.sliding_window_view(buffer, width)[index]


def _read_cached(
    descriptor: int, views: list[tuple[int, memoryview]]
) -> list[tuple[int, memoryview]]:
    """Read what the page cache holds, and return the rest."""
    missed = []
    for turn, (offset, view) in enumerate(views):
        try:
            count = os.preadv(descriptor, (view,), offset, os.RWF_NOWAIT)
        except OSError:  # it would wait, or this file system cannot say so
            count = 0
        if count < len(view):
            missed.append((offset, view))
            if turn == _TRIES == len(missed) - 1:
                return [*missed, *views[turn + 1 :]]
    return missed
