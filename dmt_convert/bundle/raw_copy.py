"""Copy byte ranges between files inside the kernel, as `cp` does, and look at them on the way.

One thread lets the kernel copy, another reads the same pages (they are in memory by then) and
checks them.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint import CHUNK_BYTES, ByteRows
from dmt_convert.checkpoint.tensor_bytes import stream_file
from dmt_convert.errors import CheckpointError

_STEP_BYTES: Final = 4 * CHUNK_BYTES
_LAG: Final = 4
_NOT_HERE: Final = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """A run of bytes in a file."""

    path: Path
    """The file."""
    offset: int
    """Where the run begins, in bytes."""
    length: int
    """How long it is, in bytes."""
    crc32: int | None = None
    """Checksum that it must have."""


def copy_range(
    descriptor: int,
    source: FileRange,
    *,
    look: Callable[[ByteRows], None],
    on_bytes: Callable[[int], None],
    pool: ThreadPoolExecutor,
) -> None:
    """Append a byte range to a file; holes stay holes.

    Args:
        descriptor: The file to write, at its current position.
        source: What to copy.
        look: Called with the bytes, chunk by chunk and in order, in another thread.
        on_bytes: Told of every copied piece.
        pool: A pool of one thread, which runs `look`.

    Raises:
        CheckpointError: The source ends before.
        OSError: The disk is full, or fails.
    """
    pending: deque[Future[None]] = deque()
    chunks = stream_file(source.path, source.offset, source.length)
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    with source.path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), source.offset, source.length, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < source.length:
            count = min(_STEP_BYTES, source.length - done)
            pending.append(pool.submit(_look_at, chunks, count, look))
            _copy(file.fileno(), source.offset + done, descriptor, position + done, count, source)
            while len(pending) > _LAG:
                pending.popleft().result()
            done += count
            on_bytes(count)
    for future in pending:
        future.result()
    os.lseek(descriptor, position + source.length, os.SEEK_SET)


def _look_at(chunks: Iterator[ByteRows], count: int, look: Callable[[ByteRows], None]) -> None:
    while count > 0:
        chunk = next(chunks)
        look(chunk)
        count -= chunk.nbytes


def _copy(
    reading: int, offset: int, writing: int, position: int, count: int, source: FileRange
) -> None:
    """Copy the data between holes of one step."""
    done = 0
    while done < count:
        begin, end = _next_data(reading, offset + done, offset + count)
        done = begin - offset
        while begin < end:
            copied = _copy_some(reading, begin, writing, position + done, end - begin)
            if copied == 0:
                raise CheckpointError(
                    f"{source.path} ends at byte {begin}",
                    expected=f"{source.length} bytes from byte {source.offset} on",
                    hint="the file changed while it was read, or was cut short",
                )
            begin += copied
            done += copied


def _next_data(descriptor: int, begin: int, end: int) -> tuple[int, int]:
    """Return the next run of a file that is not a hole, within begin and end."""
    try:
        data = os.lseek(descriptor, begin, os.SEEK_DATA)
        hole = os.lseek(descriptor, data, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO and os.fstat(descriptor).st_size >= end:
            return end, end  # nothing but a hole is left
        return begin, end
    return min(data, end), min(hole, end)


def _copy_some(reading: int, offset: int, writing: int, position: int, count: int) -> int:
    try:
        return os.copy_file_range(reading, writing, count, offset, position)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    # another file system, or a kernel that cannot: through memory, then
    data = os.pread(reading, min(count, CHUNK_BYTES), offset)
    return os.pwrite(writing, data, position) if data else 0
