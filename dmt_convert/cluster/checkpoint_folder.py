"""The folder of training checkpoints as one process sees it. No torch.

```
CHECKPOINTS/
  .lock                            held by the training that writes here
  .launch                          which launch trains, see `is_continuing`
  .step_000000200-partial/         being written; if a run was killed, the next one removes it
  step_000000100/
    manifest.json                  every other file, its size and its digest; written last
    progress.json                  what the training loop keeps beside its tensors
    .metadata, __0_0.distcp, ...   written by torch.distributed.checkpoint
  step_000000050-damaged/          was found damaged and set aside; never read, never removed
```

A checkpoint gets its name by one rename, after all its files are on the disk. What its files hold
is compared with the digests before it is used. Damage is what they show, or a file that is missing
or of another size. An error of the file system is no damage: it is raised as it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.checkpoint import FlatCheckpoint, read_dcp
from dmt_convert.errors import CheckpointError
from dmt_convert.files import TreeDigest, check_checksums, exchange_folders, sync_folder

logger = logging.getLogger(__name__)

_MANIFEST: Final = "manifest.json"
_PROGRESS: Final = "progress.json"
_VERSION: Final = 2
"""Of the layout. Version 1 has the sizes of files, and no digests."""
_CHUNK_BYTES: Final = 8 << 20
_STEP_NAME: Final = re.compile(r"step_(\d{9,})")
_LEFTOVER: Final = re.compile(r"\.step_\d{9,}-(partial|removed)")
_MARK: Final = ".launch"
_LOCK_SECONDS: Final = 10.0
"""How long to wait for the lock: processes of a killed run take a moment to go."""


class DamagedCheckpointError(CheckpointError):
    """A training checkpoint does not hold what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file of a checkpoint, as its manifest lists it."""

    bytes: int
    """Its size."""
    digest: str | None
    """Of its content, see `files/digest.py`; None in checkpoints of version 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A training checkpoint whose files are all there."""

    path: Path
    """Its folder."""
    step: int
    """Training steps done when it was saved."""
    num_ranks: int
    """By how many ranks it was saved; any number can load it."""
    progress: Mapping[str, Any]
    """What the training loop kept beside its tensors."""
    files: Mapping[str, SavedFile]
    """Its files by name, without the manifest."""


def _step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:09d}"


def _is_complete(path: Path) -> bool:
    """Return whether a checkpoint's files have the sizes that its manifest lists."""
    try:
        _read_manifest(path)
    except DamagedCheckpointError:
        return False
    return True


def read_saved(path: Path) -> SavedCheckpoint:
    """Describe a checkpoint; of its tensors, only where they lie is read.

    Raises:
        DamagedCheckpointError: Files are missing, or not as they were written.
        OSError: A file cannot be read.
    """
    manifest, files = _read_manifest(path)
    for name in (_PROGRESS, ".metadata"):
        _check_file(path / name, files[name])
    try:
        read_payload(path)
    except CheckpointError as error:
        raise _damaged(path, error.found, list(error.details)) from None
    return SavedCheckpoint(
        path=path,
        step=int(manifest["step"]),
        num_ranks=int(manifest["num_ranks"]),
        progress=_read_json(path / _PROGRESS),
        files=files,
    )


def check_share(saved: SavedCheckpoint, part: int, parts: int) -> None:
    """Read some of a checkpoint's files whole, and compare them with what was written.

    Args:
        saved: The checkpoint.
        part: Which share of its files, from 0.
        parts: How many shares there are.

    Raises:
        DamagedCheckpointError: A file holds something else.
        OSError: A file cannot be read.
    """
    if any(file.digest is None for file in saved.files.values()):  # version 1: DCP's own checksums
        try:
            for info in read_payload(saved.path).tensors[part::parts]:
                check_checksums(info, info.path)
        except CheckpointError as error:
            raise _damaged(saved.path, error.found) from None
        return
    for name in sorted(saved.files)[part::parts]:
        _check_file(saved.path / name, saved.files[name])


def _check_file(path: Path, file: SavedFile) -> None:
    if file.digest is not None and digest_file(path) != file.digest:
        raise _damaged(path.parent, f"{path.name} has other bytes than were written")


def digest_file(path: Path) -> str:
    """Return the digest of a file's content."""
    digest, buffer = TreeDigest(), bytearray(_CHUNK_BYTES)
    with _naming(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(np.frombuffer(buffer, dtype=np.uint8, count=count))
    return digest.finish()


def read_payload(path: Path) -> FlatCheckpoint:
    """Read where a checkpoint's tensors lie; runs nothing that the file holds.

    Raises:
        CheckpointError: It is damaged, or holds more than tensors.
    """
    checkpoint = read_dcp(path)
    if checkpoint.unread:
        raise CheckpointError(
            f"{path} holds pickled values ({', '.join(sorted(checkpoint.unread)[:5])})",
            expected="tensors only, as this program writes them",
            hint="it was written by another program; use a checkpoint of this training",
        )
    return checkpoint


@contextmanager
def refuse_os_errors(folder: Path, done: str) -> Iterator[None]:
    """Turn an error of the file system into one that names the folder.

    Args:
        folder: Of the checkpoints.
        done: What could not be done with it.
    """
    try:
        yield
    except OSError as error:
        raise os_refusal(error, folder, done) from None


def os_refusal(error: OSError, folder: Path, done: str, *, where: str = "") -> CheckpointError:
    """Describe an error of the file system.

    Args:
        error: The error.
        folder: Of the checkpoints.
        done: What could not be done with it.
        where: On which rank, if that matters.
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"the disk of {folder} is full{where} ({reason})",
            expected="room for one more training checkpoint than are kept",
            hint="free space, keep fewer checkpoints, or give another folder; the last whole "
            "checkpoint is still there",
        )
    name = error.filename or folder
    hint = "check its owner and permissions, or give another folder for checkpoints"
    if done == "read":
        hint = "nothing was changed; run it again when the file can be read"
    return CheckpointError(
        f"{folder} cannot be {done}{where} ({name}: {reason})",
        expected="a folder that every rank may read and write",
        hint=hint,
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of reading it, as an error of opening it does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _read_manifest(path: Path) -> tuple[Mapping[str, Any], dict[str, SavedFile]]:
    manifest = _read_json(path / _MANIFEST)
    files = _parse_files(manifest)
    if files is None:
        raise _damaged(path, f"{_MANIFEST} is of an unknown version")
    faults = []
    for name, file in files.items():
        entry = path / name
        found = entry.stat().st_size if entry.is_file() else None
        if found != file.bytes:
            what = "missing" if found is None else f"{found} bytes"
            faults.append(f"{name}: {what}, not {file.bytes}")
    if faults or not {_PROGRESS, ".metadata"} <= set(files):
        raise _damaged(path, f"{len(faults)} of {len(files)} files are not as written", faults)
    match = _STEP_NAME.fullmatch(path.name)
    step, num_ranks = manifest.get("step"), manifest.get("num_ranks")
    if match is None or step != int(match[1]) or not isinstance(num_ranks, int):
        raise _damaged(path, f"{_MANIFEST} is of step {step}")
    return manifest, files


def _parse_files(manifest: Mapping[str, Any]) -> dict[str, SavedFile] | None:
    version, listed = manifest.get("version"), manifest.get("files")
    if not isinstance(listed, dict) or version not in (1, _VERSION):
        return None
    files = {}
    for name, value in listed.items():
        size, digest = (value, None) if version == 1 else _size_and_digest(value)
        if not isinstance(size, int) or not isinstance(digest, str | None):
            return None
        if version != 1 and digest is None:
            return None
        files[name] = SavedFile(bytes=size, digest=digest)
    return files


def _size_and_digest(value: object) -> tuple[object, object]:
    return (value.get("bytes"), value.get("digest")) if isinstance(value, dict) else (None, None)


def _damaged(path: Path, found: str, details: list[str] | None = None) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged: {found}",
        expected="a training checkpoint as it was written",
        hint="run it again with --resume: it goes on from what is whole",
        details=details or (),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with _naming(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path.parent, f"{path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path.parent, f"{path.name} holds no object")
    return value


class CheckpointFolder:
    """A folder of checkpoints, for the one process that writes names into it.

    Args:
        path: The folder; it is made if it is missing.

    Raises:
        CheckpointError: It cannot be written to, or another training writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        with refuse_os_errors(self.path, "written to"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.path)
            for left in self.path.iterdir():
                if _LEFTOVER.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)

    def close(self) -> None:
        """Let others write here."""
        os.close(self._lock)

    def begin(self, step: int) -> Path:
        """Make the folder that a checkpoint is written into.

        Raises:
            CheckpointError: There is a later checkpoint, or nothing can be written.
        """
        later = [path for other, path in self._named() if other > step and _is_complete(path)]
        if later:
            raise CheckpointError(
                f"{self.path} holds {later[-1].name}, which is later than step {step}",
                expected="checkpoints of one training, each later than the one before",
                hint="resume from the newest, remove it, or give another folder",
            )
        partial = self._partial(step)
        with refuse_os_errors(self.path, "written to"):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
        return partial

    def abandon(self, step: int) -> None:
        """Remove what was written of a checkpoint that failed."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def complete(
        self,
        step: int,
        progress: Mapping[str, Any],
        *,
        num_ranks: int,
        digests: Mapping[str, str] | None = None,
    ) -> Path:
        """Give a checkpoint its name; all its tensors are on the disk.

        Args:
            step: Its step.
            progress: What the training loop keeps beside its tensors.
            num_ranks: How many ranks wrote it.
            digests: Of files, taken as they were written; of others they are taken here.

        Raises:
            CheckpointError: A file is not there, or the disk is full.
        """
        partial, final = self._partial(step), self.path / _step_name(step)
        with refuse_os_errors(self.path, "written to"):
            _write_json(partial / _PROGRESS, dict(progress))
            names = sorted([_PROGRESS, *(path.name for path in _check_payload(partial).files)])
            taken = digests or {}
            files = {
                name: {
                    "bytes": (partial / name).stat().st_size,
                    "digest": taken.get(name) or digest_file(partial / name),
                }
                for name in names
            }
            manifest = {"version": _VERSION, "step": step, "num_ranks": num_ranks, "files": files}
            _write_json(partial / _MANIFEST, manifest)
            sync_folder(partial)
            if final.exists():
                self._replace(partial, final)
            else:
                partial.rename(final)
            sync_folder(self.path)
        return final

    def newest(
        self, *, before: int | None = None, damage: Mapping[int, str]
    ) -> tuple[SavedCheckpoint | None, dict[int, str]]:
        """Return the newest checkpoint that does not look damaged, and what does.

        Args:
            before: Only one of an earlier step.
            damage: Step -> what is wrong with its checkpoint, of those known to be damaged.

        Raises:
            CheckpointError: A file cannot be read; whether it is damaged is not known.
        """
        damage = dict(damage)
        for step in reversed(self.steps()):
            if step in damage or (before is not None and step >= before):
                continue
            try:
                return self._read(step), damage
            except DamagedCheckpointError as error:
                damage[step] = error.found
        return None, damage

    def at(self, step: int) -> SavedCheckpoint | None:
        """Return the checkpoint of a step; None if there is none.

        Raises:
            DamagedCheckpointError: It looks damaged.
            CheckpointError: A file cannot be read.
        """
        return self._read(step) if step in self.steps() else None

    def _read(self, step: int) -> SavedCheckpoint:
        path = self.path / _step_name(step)
        with refuse_os_errors(path, "read"):
            return read_saved(path)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, whole or damaged, in order.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        with refuse_os_errors(self.path, "read"):
            return [step for step, _ in self._named()]

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint a name under which it is never read; returns it.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        path = self.path / _step_name(step)
        with refuse_os_errors(self.path, "written to"):
            aside, count = path.with_name(f"{path.name}-damaged"), 1
            while aside.exists():
                count += 1
                aside = path.with_name(f"{path.name}-damaged-{count}")
            path.rename(aside)
            sync_folder(self.path)
        return aside

    def prune(self, keep: int, protect: Collection[int] = ()) -> None:
        """Keep the newest `keep` whole checkpoints, and remove older ones.

        Where a file cannot be read now, nothing is removed; the next call makes up for it.

        Args:
            keep: How many stay.
            protect: Steps that stay as well.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        try:
            named = self._named()
            whole = [step for step, path in named if _is_complete(path)]
        except OSError as error:
            logger.warning("older checkpoints are kept: %s", error)
            return
        with refuse_os_errors(self.path, "written to"):
            if len(whole) >= keep:
                for step, path in named:
                    if step < whole[-keep] and step not in protect:
                        self._remove(path)

    def discard_after(self, step: int) -> None:
        """Remove all checkpoints of later steps, whole or not.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        with refuse_os_errors(self.path, "written to"):
            for other, path in self._named():
                if other > step:
                    self._remove(path)

    def _named(self) -> list[tuple[int, Path]]:
        """All checkpoints, whole or damaged, oldest first."""
        found = []
        for path in self.path.iterdir():
            match = _STEP_NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
        return sorted(found)

    def _partial(self, step: int) -> Path:
        return self.path / f".{_step_name(step)}-partial"

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; it loses its name first, so that no half of one is ever seen."""
        removed = path.with_name(f".{path.name}-removed")
        if removed.exists():
            shutil.rmtree(removed)
        path.rename(removed)
        shutil.rmtree(removed)

    def _replace(self, partial: Path, final: Path) -> None:
        """Replace an earlier checkpoint of the same step."""
        try:
            exchange_folders(partial, final)
            shutil.rmtree(partial)
        except OSError as error:  # some network file systems cannot exchange
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            self._remove(final)
            partial.rename(final)


def _take_lock(folder: Path) -> int:
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(lock)
                raise CheckpointError(
                    f"another training writes its checkpoints to {folder}",
                    expected="one training per folder",
                    hint="wait until it ends, stop it, or give another folder",
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return lock  # a network file system without locks
            os.close(lock)
            raise


def _check_payload(partial: Path) -> FlatCheckpoint:
    try:
        return read_payload(partial)
    except CheckpointError as error:
        raise CheckpointError(
            f"what the ranks wrote is not all in {partial.parent}: {error.found}",
            expected="one folder that all hosts share",
            hint="give a folder for checkpoints on storage that every host mounts",
            details=error.details,
        ) from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def is_continuing(folder: Path) -> bool:
    """Whether this launch had begun to train before its ranks were started again.

    torchrun starts all ranks again after any of them failed, also after a refusal. Training goes
    on from checkpoints, or replaces a bundle, without the user saying so only if this launch made
    them. So the first rank leaves the launch's name beside them (`mark_begun`) when nothing stands
    in the way of training any more.

    Args:
        folder: Of the checkpoints; perhaps not there.

    Raises:
        CheckpointError: It cannot be read.
    """
    mark = folder / _MARK
    with refuse_os_errors(folder, "read"):
        return mark.is_file() and mark.read_text(encoding="utf-8") == _launch_name()


def mark_begun(folder: Path) -> None:
    """Note that this launch begins to train.

    Args:
        folder: Of the checkpoints.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    with refuse_os_errors(folder, "written to"):
        (folder / _MARK).write_text(_launch_name(), encoding="utf-8")


def _launch_name() -> str:
    """Name the launch: torchrun's name for it, which may occur again, and its process."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8")
        started = stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {parent} {started}"
