"""Write a folder or a file beside its target, then put it in place in one step.

A reader sees the old one or the new one, never a mixture. Everything is written inside a hidden
folder of this call's own beside the target. A process that is killed leaves that folder behind,
and the next one that writes to the same target removes it; a lock tells which are still in use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmt_convert.errors import BundleError, ConfigError, DmtError, ExportError

_MARK: Final = ".dmt-tmp-"
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_COUNTER: Final = itertools.count()
MANIFEST_NAME: Final = "dmt.json"
"""The document that makes a folder a bundle."""
_BUNDLE_NAMES: Final = frozenset(
    {MANIFEST_NAME, "plan.json", "weights", "report.html", "partition.svg"}
)
"""What lies in a bundle's folder; a folder that holds anything else is never replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One kind of thing that is written: how errors speak of it."""

    noun: str
    """What it is called."""
    error: type[DmtError]
    """What is raised if it cannot be written."""
    smaller: str = ""
    """How less of it could be written, as advice."""


BUNDLE: Final = Output(
    noun="bundle", error=BundleError, smaller="store tables smaller with --dtype fp16"
)
"""The only kind of folder that may replace another: a bundle."""
EXPORT: Final = Output(
    noun="export", error=BundleError, smaller="store tables smaller with --quantize int8"
)
TENSORS: Final = Output(
    noun="tensors", error=ExportError, smaller="write some of the tensors with --only"
)
_FILE: Final = Output(noun="file", error=ConfigError)


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
            expected="a folder that holds the bundle only, so that it can be replaced",
            hint="move these files away, or choose another --out; they are never deleted",
            details=others,
        )


def check_free(out: Path, output: Output) -> None:
    """Refuse a target that exists, whatever it is.

    Raises:
        DmtError: It exists, or its parent does not.
    """
    if os.path.lexists(out) and not _is_empty(out):
        raise output.error(
            f"{out} exists",
            expected=f"a path where nothing is, for the {output.noun}",
            hint="choose another --out, or remove it first; what is there is never deleted",
        )
    check_target(out, force=False)


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def check_space(out: Path, needed_bytes: int, output: Output = BUNDLE) -> None:
    """Refuse a disk that has less than `needed_bytes` left.

    Raises:
        DmtError: It has less.
    """
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        raise output.error(
            f"the disk of {out.parent} has {free / 2**30:.2f} GiB left",
            expected=f"{needed_bytes / 2**30:.2f} GiB for the {output.noun}",
            hint=f"free space, choose another --out, or {output.smaller}",
        )


@contextmanager
def staged_folder(
    out: Path, *, needed_bytes: int, force: bool = False, output: Output = BUNDLE
) -> Iterator[Path]:
    """Give a folder to write into; on success it becomes `out`, on failure it goes away.

    Args:
        out: The target.
        needed_bytes: How much will be written; refused at once if the disk has less.
        force: Whether an existing bundle may be replaced.
        output: What is written; only a bundle can replace another one.

    Raises:
        DmtError: The target is taken, or the disk is full.
    """

    def check() -> None:
        if output is BUNDLE:
            check_target(out, force=force)
        else:
            check_free(out, output)

    check()
    with _staging(out, output, needed_bytes, alone=True) as staging:
        _try_in_place(staging, out)
        yield staging
        for folder, _, _ in os.walk(staging, topdown=False):
            sync_folder(Path(folder))
        check()  # again: this took a while
        _put_in_place(staging, out)


@contextmanager
def staged_file(
    path: Path, *, needed_bytes: int = 0, force: bool = True, output: Output = _FILE
) -> Iterator[Path]:
    """Give a file to write beside `path`; on success it becomes `path`, on failure it goes away.

    The file has the same name as `path`, since some writers go by the name.

    Args:
        path: The target.
        needed_bytes: How much will be written; refused at once if the disk has less.
        force: Whether an existing file may be replaced.
        output: What is written.

    Raises:
        DmtError: The file cannot be written, exists already, or the disk is full.
    """
    try:
        with _staging(path, output, needed_bytes, alone=False) as folder:
            staged = folder / path.name
            yield staged
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
            if force:
                staged.replace(path)
            else:
                _rename_new(staged, path, output)
            _confirm(path, output)
    except OSError as error:
        if not _concerns(error, path):
            raise
        raise output.error(
            f"{path} cannot be written ({error.strerror})",
            expected="a file that can be written, in an existing folder, on a disk with space",
            hint="choose another file",
        ) from None


def _confirm(path: Path, output: Output) -> None:
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise output.error(
            f"{path} was written, but the disk did not confirm its name ({error.strerror})",
            expected="a disk that works",
            hint="look into the log of the system, and copy the file to another disk",
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _concerns(error: OSError, path: Path) -> bool:
    """Tell whether an error is about the target, and not about a file that was read meanwhile."""
    if error.filename is None:
        return True
    about = Path(os.fsdecode(error.filename))
    return about in (path, path.parent) or any(
        folder.name.startswith(f".{path.name}{_MARK}") for folder in (about, about.parent)
    )


@contextmanager
def _staging(out: Path, output: Output, needed_bytes: int, *, alone: bool) -> Iterator[Path]:
    """Give a locked folder beside the target; it goes away in the end, unless it was renamed."""
    # a name of our own: whatever goes wrong, what is removed is what this call made
    staging = out.parent / f".{out.name}{_MARK}{os.getpid()}-{next(_COUNTER)}"
    lock = None
    try:  # from before the folder is made: an interrupt may come at any moment
        lock = _make_locked(staging, out, output, needed_bytes, alone=alone)
        yield staging
    except OSError as error:
        if error.errno in _FULL and needed_bytes:
            raise output.error(
                f"the disk of {out.parent} is full ({os.strerror(error.errno)})",
                expected=f"{needed_bytes} bytes for the {output.noun}",
                hint="free space, or choose another --out; nothing was changed",
            ) from None
        if error.errno in _FORBIDDEN and lock is None and needed_bytes:
            raise output.error(
                f"nothing can be written to {out.parent.absolute()} ({os.strerror(error.errno)})",
                expected="a folder that you may write to",
                hint="choose another place with --out",
            ) from None
        raise
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def _make_locked(
    staging: Path, out: Path, output: Output, needed_bytes: int, *, alone: bool
) -> int:
    """Make the folder and lock it; the lock says that this process still writes to it.

    The parent is locked while folders are made and removed, so that no process removes a folder
    that another has made and not locked yet.
    """
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(parent, fcntl.LOCK_EX)
        _remove_stale(out, alone=alone)
        if needed_bytes:
            check_space(out, needed_bytes, output)
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    finally:
        os.close(parent)


def _remove_stale(out: Path, *, alone: bool) -> None:
    """Remove what killed processes left beside a target.

    Args:
        out: The target.
        alone: Whether a process that still writes to it is an error; otherwise the last one wins.
    """
    for stale in out.parent.glob(f".{glob.escape(out.name)}{_MARK}*"):
        if stale.is_symlink() or not stale.is_dir():
            continue
        descriptor = os.open(stale, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if alone:
                raise BundleError(
                    f"another conversion to {out} is running ({stale.name})",
                    expected="one conversion at a time to one target",
                    hint="wait for it, or choose another --out",
                ) from None
        else:
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(descriptor)


def _try_in_place(staging: Path, out: Path) -> None:
    """Refuse a target that cannot be replaced in one step, before any work is done."""
    if os.path.ismount(out):
        raise BundleError(
            f"{out} is the root of a mounted file system, which cannot be replaced",
            expected="a folder inside a file system",
            hint=f"write to a folder inside of it: --out {out / 'bundle'}",
        )
    if out.is_dir() and any(out.iterdir()):
        first, second = (staging / f"{name}{_MARK}" for name in "ab")
        first.mkdir()
        second.mkdir()
        try:
            exchange_folders(first, second)
        except OSError as error:
            raise _no_exchange(out, error) from None
        finally:
            first.rmdir()
            second.rmdir()


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename; if a bundle is there, swap the two atomically (the old one then goes away)."""
    replaced = out.is_dir() and any(out.iterdir())
    if replaced:
        try:
            exchange_folders(staging, out)
        except OSError as error:
            raise _no_exchange(out, error) from None
    else:
        staging.rename(out)
    try:
        sync_folder(out.parent)
    except OSError as error:
        kept = _keep(staging, out) if replaced else None
        raise BundleError(
            f"{out} was written and put in place, but the disk did not confirm its name "
            f"({error.strerror})",
            expected="a disk that works",
            hint="look into the log of the system, and copy the new bundle to another disk"
            + (f"; the old one is kept as {kept}" if kept is not None else ""),
        ) from None


def _keep(old: Path, out: Path) -> Path:
    """Save a replaced bundle from being removed; returns where it is."""
    kept = next(
        path
        for path in (out.with_name(f"{out.name}.old{n or ''}") for n in itertools.count())
        if not os.path.lexists(path)
    )
    old.rename(kept)
    return kept


def _no_exchange(out: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{out} cannot be replaced in one step here ({error.strerror})",
        expected="a local Linux file system (renameat2 with RENAME_EXCHANGE)",
        hint="choose another --out, or move the old bundle away first",
    )


def _rename_new(staged: Path, path: Path, output: Output) -> None:
    """Rename if nothing is there, in one step if the file system can."""
    try:
        os.link(staged, path)
    except FileExistsError:
        raise file_exists(path, output) from None
    except OSError:  # no hard links here
        if os.path.lexists(path):
            raise file_exists(path, output) from None
        staged.rename(path)


def file_exists(path: Path, output: Output) -> DmtError:
    """Make the error for a file that must not be replaced."""
    return output.error(
        f"{path} exists",
        expected="a path where nothing is",
        hint="choose another --out, or replace the file with --force",
    )


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


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk, if its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
