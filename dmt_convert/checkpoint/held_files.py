"""Files that stay the same while a model is read from them.

A file is opened once, when its header is read, and held: whoever replaces it under its name does
not change what is read. Whoever writes into it is found out: the device, inode, size and time of
the last change are those of the beginning, or reading ends with an error. Bytes are copied out of
the file and never mapped, since a mapped file that is cut short kills the process.

There may be more files than descriptors. The least recently used are closed, and opened again when
they are needed; then they must still be the same files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.errors import CheckpointError

_KEYS: Final = itertools.count()
_MOST_DESCRIPTORS: Final = 512
_MOST_SEEN: Final = 20_000
"""Files of a folder whose state is noted before its headers are read."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a file from another."""

    device: int
    """The file system."""
    inode: int
    """The file in it."""
    size: int
    """Its size in bytes."""
    modified_ns: int
    """When its content changed last, in nanoseconds."""

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        """Take what matters from `os.stat`."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_same_file(self, other: FileIdentity) -> bool:
        """Tell whether it is the same file, whatever was written to it since."""
        return (self.device, self.inode) == (other.device, other.inode)


class _Descriptors:
    """Open descriptors of held files; beyond a limit the least recently used are closed."""

    def __init__(self) -> None:
        # a file may be given up by the garbage collector, in the midst of any of these methods
        self._lock = threading.RLock()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def borrow(self, key: int) -> int | None:
        """Return the descriptor of a file; None if it is closed."""
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is not None:
                self._open.move_to_end(key)
                self._users[key] = self._users.get(key, 0) + 1
            return descriptor

    def add(self, key: int, descriptor: int) -> int:
        """Take a descriptor, lend it, and close others if there are too many."""
        with self._lock:
            other = self.borrow(key)
            if other is not None:  # opened by two threads at once
                os.close(descriptor)
                return other
            self._open[key], self._users[key] = descriptor, 1
            self._close_idle(_limit())
            return descriptor

    def give_back(self, key: int) -> None:
        """End one use of a file."""
        with self._lock:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]

    def close(self, key: int) -> None:
        """Close the descriptor of a file that nobody can use any more."""
        with self._lock:
            descriptor = self._open.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)

    def close_idle(self) -> None:
        """Close every descriptor that is not being used."""
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, keep: int) -> None:
        for key in [key for key in self._open if key not in self._users]:
            if len(self._open) <= keep:
                return
            self.close(key)


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_DESCRIPTORS if soft < 0 else max(2, min(_MOST_DESCRIPTORS, soft // 4))


_DESCRIPTORS: Final = _Descriptors()


class HeldFile:
    """A file as it is now: what is read of it later is this content, or an error.

    Args:
        path: The file.
        identity: What it must be; by default, whatever it is now.

    Raises:
        CheckpointError: It is not a regular file, or not the one that it must be.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, identity: FileIdentity | None = None) -> None:
        self.path = path
        self._key = next(_KEYS)
        weakref.finalize(self, _DESCRIPTORS.close, self._key)
        descriptor = _open_regular(path)
        self._first = os.fstat(descriptor)
        self.identity = identity or FileIdentity.of(self._first)
        _DESCRIPTORS.add(self._key, descriptor)
        try:
            self._check(descriptor)
        finally:
            _DESCRIPTORS.give_back(self._key)

    def __repr__(self) -> str:
        """Name the file."""
        return f"<HeldFile {self.path}>"

    def __reduce__(self) -> tuple[type[HeldFile], tuple[Path, FileIdentity]]:
        """Let copies and other processes open the same file again."""
        return HeldFile, (self.path, self.identity)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Lend a descriptor to read from at given positions; checks the file before and after.

        Raises:
            CheckpointError: The file changed, or had to be opened again and is another one now.
            OSError: It cannot be opened again.
        """
        descriptor = _DESCRIPTORS.borrow(self._key)
        if descriptor is None:
            descriptor = _DESCRIPTORS.add(self._key, _open_regular(self.path))
        try:
            self._check(descriptor)
            yield descriptor
            self._check(descriptor)
        finally:
            _DESCRIPTORS.give_back(self._key)

    def read_into(self, descriptor: int, offset: int, view: memoryview) -> None:
        """Fill a buffer from a position of the file.

        Args:
            descriptor: What `open` lent.
            offset: Where to begin, in bytes.
            view: The buffer.

        Raises:
            CheckpointError: The file ends before.
            OSError: It cannot be read; names the file.
        """
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(descriptor, [view[filled:]], offset + filled)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not count:
                self._check(descriptor)
                raise CheckpointError(
                    f"{self.path} ends {len(view) - filled} bytes early",
                    expected=f"{len(view)} bytes from byte {offset} on",
                    hint="the file was cut short; copy it again",
                )
            filled += count

    def check_unchanged(self, *, by_name: bool = False, times: bool = False) -> None:
        """Refuse a file that was written to.

        Args:
            times: Also refuse one that was written to by a tool that set its time back.
            by_name: Also refuse another file under its name; none at all is no harm.

        Raises:
            CheckpointError: It changed.
        """
        descriptor = _DESCRIPTORS.borrow(self._key)
        if descriptor is not None:
            try:
                self._check(descriptor)
                if times:
                    self._check_times(os.fstat(descriptor))
            finally:
                _DESCRIPTORS.give_back(self._key)
        if by_name or descriptor is None:
            with contextlib.suppress(FileNotFoundError):
                found = FileIdentity.of(self.path.stat())
                if found != self.identity:
                    raise _changed(self.path, replaced=not found.is_same_file(self.identity))

    def _check_times(self, found: os.stat_result) -> None:
        """Refuse a file that was written to by a tool that set its time back afterwards.

        The time of the last change of the inode tells; but it also changes with owner, permissions,
        name and links.
        """
        harmless = ("st_mode", "st_uid", "st_gid", "st_nlink")
        if found.st_ctime_ns == self._first.st_ctime_ns or any(
            getattr(found, name) != getattr(self._first, name) for name in harmless
        ):
            return
        with contextlib.suppress(OSError):
            if FileIdentity.of(self.path.stat()).is_same_file(self.identity):
                raise _changed(self.path, replaced=False)

    def _check(self, descriptor: int) -> None:
        found = FileIdentity.of(os.fstat(descriptor))
        if found != self.identity:
            raise _changed(self.path, replaced=not found.is_same_file(self.identity))


def _open_regular(path: Path) -> int:
    """Open a file for reading; a pipe is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        _DESCRIPTORS.close_idle()
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(
            f"{path} is not a regular file",
            expected="files on a disk, whose bytes can be read in any order",
            hint="write it to a file first",
        )
    return descriptor


def _changed(path: Path, *, replaced: bool) -> CheckpointError:
    if replaced:
        return CheckpointError(
            f"{path} was replaced by another file while it was read",
            expected="files that stay as they are until they have been read",
            hint="run it again, or open it again; if a trainer goes on saving to this path, copy "
            "it first",
        )
    return CheckpointError(
        f"{path} changed while it was read: a trainer or a copy wrote to it",
        expected="files that stay as they are until they have been read",
        hint="wait until it is written, or copy it first, and run it again",
    )


@dataclass(frozen=True, slots=True)
class _Holder:
    """The files of what is being opened."""

    before: dict[Path, FileIdentity]
    """Files as they were before any header was read, as far as they were known."""
    files: dict[Path, HeldFile | None]
    """Files by the path in their pieces; None if a file cannot be opened."""


_HOLDER: ContextVar[_Holder | None] = ContextVar("holder", default=None)


@contextlib.contextmanager
def holding(source: Path) -> Iterator[dict[Path, HeldFile | None]]:
    """Hold every file of which a piece is described in the block.

    Args:
        source: What is being opened: its files must not change while their headers are read.

    Yields:
        The files that are held, by path.
    """
    holder = _Holder(_look(source), {})
    token = _HOLDER.set(holder)
    try:
        yield holder.files
    finally:
        _HOLDER.reset(token)


def hold(path: Path) -> HeldFile | None:
    """Return the held file of a piece; None outside of `holding`, or if it cannot be opened.

    Raises:
        CheckpointError: The file changed since `holding` began.
    """
    holder = _HOLDER.get()
    if holder is None:
        return None
    if path not in holder.files:
        try:
            holder.files[path] = HeldFile(path, holder.before.get(path))
        except OSError:  # the reader, or whoever reads the tensor, says what is wrong
            holder.files[path] = None
    return holder.files[path]


def _look(source: Path) -> dict[Path, FileIdentity]:
    """Note the state of a file, or of the files in a folder."""
    seen: dict[Path, FileIdentity] = {}
    paths = iter([source])
    if source.is_dir():
        paths = (Path(folder, name) for folder, _, names in os.walk(source) for name in names)
    for path in paths:
        with contextlib.suppress(OSError):
            seen[path] = FileIdentity.of(path.stat())
        if len(seen) >= _MOST_SEEN:
            break
    return seen
