"""Write large files past the page cache, at the disk's own pace.

What goes through the page cache is copied once more by the kernel, throttled when too much of it
is dirty, and pushes everything else out of memory. Aligned blocks written directly avoid all
three, and are on the disk when the call returns. If a file system cannot do that, the same
blocks go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

from dmt_convert.checkpoint import CHUNK_BYTES, ZEROS, ByteRows

ALIGNMENT: Final = 4096
_IN_FLIGHT: Final = 3
"""Blocks on their way to the disk at a time; with a single one the disk would idle in between."""


class AlignedWriter:
    """Appends bytes to a new file; runs of zeros from holes stay holes.

    Args:
        path: The file; must not exist.
        begin: Position of the first byte, a multiple of `ALIGNMENT`.

    Raises:
        OSError: The disk is full, or fails.
    """

    def __init__(self, path: Path, begin: int) -> None:
        assert begin % ALIGNMENT == 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(path, flags, 0o666)  # the umask says who may read it
        self._direct = self._write_directly()
        # anonymous maps are aligned to pages
        self._blocks = [memoryview(mmap.mmap(-1, CHUNK_BYTES)) for _ in range(_IN_FLIGHT + 1)]
        self._pool = ThreadPoolExecutor(_IN_FLIGHT)
        self._pending: deque[Future[None]] = deque()
        self._turn = 0
        self._filled = 0
        self._all_zero = True
        self._position = begin

    def __enter__(self) -> AlignedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def write(self, chunk: ByteRows) -> None:
        """Append bytes; `ZEROS` itself stands for a hole."""
        self._all_zero &= chunk is ZEROS
        data = chunk.data
        while len(data):
            part = data[: CHUNK_BYTES - self._filled]
            block = self._blocks[self._turn]
            block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._send()
                self._all_zero = chunk is ZEROS

    def _send(self) -> None:
        """Have the full block written, and go on with one that is free."""
        if not self._all_zero:
            block = self._blocks[self._turn]
            self._pending.append(self._pool.submit(self._flush, block, self._position))
            self._turn = (self._turn + 1) % len(self._blocks)
            while len(self._pending) > _IN_FLIGHT:
                self._pending.popleft().result()
        self._position += CHUNK_BYTES
        self._filled = 0

    def _finish(self) -> None:
        """Write what is left; its end is not aligned, so it goes through the cache."""
        for future in self._pending:
            future.result()
        self._write_cached()
        self._flush(self._blocks[self._turn][: self._filled], self._position)
        os.ftruncate(self._descriptor, self._position + self._filled)

    def _flush(self, block: memoryview, position: int) -> None:
        done = 0
        while done < len(block):
            direct = self._direct
            try:
                done += os.pwrite(self._descriptor, block[done:], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._write_cached()
            if done % ALIGNMENT:
                self._write_cached()  # a short write, as before a full disk

    def _write_directly(self) -> bool:
        """Turn direct writing on; returns whether the file system takes it."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _write_cached(self) -> None:
        """Turn direct writing off, for this block and all that follow."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False
