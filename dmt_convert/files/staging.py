"""Write a folder beside its target, then put it in place in one step.

A reader sees the old folder or the new one, never a mixture; a process that is killed leaves a
hidden sibling behind, which the next conversion to the same target removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from dmt_convert.errors import BundleError

_MARK: Final = ".dmt-tmp-"
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_COUNTER: Final = itertools.count()
MANIFEST_NAME: Final = "dmt.json"
"""The document that makes a folder a bundle."""
_BUNDLE_NAMES: Final = frozenset(
    {MANIFEST_NAME, "plan.json", "weights", "report.html", "partition.svg"}
)
"""What lies in a bundle's folder; with anything else in it, it is never replaced."""


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a target that must not be replaced.

    Raises:
        BundleError: Something is there and `force` is not given, or it is not a bundle, or
            holds more than a bundle does.
    """
    if not out.parent.is_dir() or out.name in ("", ".."):
        found = f"--out {out} names no new folder" if out.parent.is_dir() else None
        raise BundleError(
            found or f"the folder {out.parent} does not exist",
            expected="the name of a folder to write, in a folder that exists",
            hint="name the bundle, as in --out models/ckpt-dmt4"
            if found
            else f"mkdir -p {out.parent}",
        )
    if not os.path.lexists(out):
        return
    if _is_empty(out):
        return
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        kind = "a symbolic link" if out.is_symlink() else "not a bundle"
        raise BundleError(
            f"{out} exists and is {kind}",
            expected="a path where nothing is, or a bundle that may be replaced",
            hint="choose another --out; what is there is never deleted",
        )
    if not force:
        raise BundleError(
            f"{out} exists",
            expected="a path where nothing is",
            hint="choose another --out, or replace the bundle with --force",
        )
    others = sorted({path.name for path in out.iterdir()} - _BUNDLE_NAMES)
    if others:
        raise BundleError(
            f"{out} holds files beside the bundle's own",
            expected="a bundle and nothing else, where it is to be replaced",
            hint="move these files away, or choose another --out; they are never deleted",
            details=others,
        )


def check_free(out: Path, what: str) -> None:
    """Refuse a target where anything is, whatever it is.

    Args:
        out: The folder to be written.
        what: What it will be, for errors.

    Raises:
        BundleError: It is there, or its parent is not.
    """
    if os.path.lexists(out) and not _is_empty(out):
        raise BundleError(
            f"{out} exists",
            expected=f"a path where nothing is, for the {what}",
            hint="choose another --out, or remove it first; what is there is never deleted",
        )
    check_target(out, force=False)


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


@contextmanager
def staged_folder(
    out: Path, *, force: bool, needed_bytes: int, what: str = "bundle"
) -> Iterator[Path]:
    """Give a folder to write into; on success it becomes `out`, on failure it goes away.

    Args:
        out: The target.
        force: Whether a bundle that is there may be replaced.
        needed_bytes: How much will be written; refused at once where the disk has less.
        what: What is written, for errors; only a bundle can replace another one.

    Raises:
        BundleError: The target is taken, or the disk is full.
    """
    check = check_target if what == "bundle" else lambda out, force: check_free(out, what)
    check(out, force=force)
    # a name of our own: whatever goes wrong, what is removed is what this call made
    staging = out.parent / f".{out.name}{_MARK}{os.getpid()}-{next(_COUNTER)}"
    lock = None
    try:  # from before the folder is made: an interrupt may come at any moment
        lock = _make_locked(staging, out, needed_bytes, what)
        yield staging
        for folder, _, _ in os.walk(staging, topdown=False):
            sync_folder(Path(folder))
        check(out, force=force)  # again: this took a while
        _put_in_place(staging, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BundleError(
                f"the disk of {out.parent} is full ({os.strerror(error.errno)})",
                expected=f"{needed_bytes} bytes for the {what}",
                hint="free space, or choose another --out; nothing was changed",
            ) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and lock is None:
            raise BundleError(
                f"nothing can be written to {out.parent.absolute()} ({os.strerror(error.errno)})",
                expected="a folder that you may write to",
                hint="choose another place with --out",
            ) from None
        raise
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder that others may read, whatever the umask says."""
    path.mkdir()
    path.chmod(0o755)


def _make_locked(staging: Path, out: Path, needed_bytes: int, what: str) -> int:
    """Make the staging folder and lock it; conversions to siblings wait for each other here."""
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(parent, fcntl.LOCK_EX)
        _remove_stale(out)
        check_space(out, needed_bytes, what)
        make_folder(staging)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    finally:
        os.close(parent)


def check_space(out: Path, needed_bytes: int, what: str = "bundle") -> None:
    """Refuse where the disk has less than `needed_bytes`.

    Raises:
        BundleError: It has less.
    """
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        raise BundleError(
            f"the disk of {out.parent} has {free / 2**30:.2f} GiB left",
            expected=f"{needed_bytes / 2**30:.2f} GiB for the {what}",
            hint="free space, choose another --out, or store tables smaller with "
            + ("--dtype fp16" if what == "bundle" else "--quantize int8"),
        )


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename; where a bundle is there, swap the two atomically (the old one then goes away)."""
    if out.is_dir() and any(out.iterdir()):
        try:
            exchange_folders(staging, out)
        except OSError as error:
            raise BundleError(
                f"{out} cannot be replaced in one step here ({error.strerror})",
                expected="a local Linux file system (renameat2 with RENAME_EXCHANGE)",
                hint="choose another --out, or move the old bundle away first",
            ) from None
    else:
        staging.rename(out)
    sync_folder(out.parent)


def exchange_folders(a: Path, b: Path) -> None:
    """Give each of two folders the other's name, in one step.

    Raises:
        OSError: One is not there, or the file system cannot do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def _remove_stale(out: Path) -> None:
    """Remove what killed conversions to the same target left behind."""
    for stale in out.parent.glob(f".{glob_escape(out.name)}{_MARK}*"):
        if stale.is_symlink() or not stale.is_dir():
            continue
        descriptor = os.open(stale, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(
                f"another conversion to {out} is running ({stale.name})",
                expected="one conversion at a time to one target",
                hint="wait for it, or choose another --out",
            ) from None
        else:
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(descriptor)


def glob_escape(name: str) -> str:
    """Escape a file name for `Path.glob`."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
