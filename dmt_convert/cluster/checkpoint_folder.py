"""The folder of training checkpoints as one process sees it. No torch.

```
CHECKPOINTS/
  .lock                            held by the training that writes here
  .launch                          which launch trains, see `is_continuing`
  .step_000000200-partial/         being written; if a run was killed, the next one removes it
  step_000000100/
    manifest.json                  every other file and its size; written last
    progress.json                  what the training loop keeps beside its tensors
    .metadata, __0_0.distcp, ...   written by torch.distributed.checkpoint
```

A checkpoint gets its name by one rename, after all its files are on the disk.
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

from dmt_convert.checkpoint import FlatCheckpoint, read_dcp
from dmt_convert.errors import CheckpointError
from dmt_convert.files import exchange_folders, sync_folder

logger = logging.getLogger(__name__)

_MANIFEST: Final = "manifest.json"
_PROGRESS: Final = "progress.json"
_VERSION: Final = 1
"""Of the layout."""
_STEP_NAME: Final = re.compile(r"step_(\d{9,})")
_LEFTOVER: Final = re.compile(r"\.step_\d{9,}-(partial|removed)")
_MARK: Final = ".launch"
_LOCK_SECONDS: Final = 10.0
"""How long to wait for the lock: processes of a killed run take a moment to go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A whole training checkpoint."""

    path: Path
    """Its folder."""
    step: int
    """Training steps done when it was saved."""
    num_ranks: int
    """By how many ranks it was saved; any number can load it."""
    progress: Mapping[str, Any]
    """What the training loop kept beside its tensors."""


def _step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:09d}"


def _is_complete(path: Path) -> bool:
    """Return whether a checkpoint's files have the sizes that its manifest lists."""
    try:
        _check_sizes(path)
    except CheckpointError:
        return False
    return True


def read_saved(path: Path) -> SavedCheckpoint:
    """Describe a whole checkpoint.

    Raises:
        CheckpointError: It is not whole.
    """
    manifest = _check_sizes(path)
    read_payload(path)
    return SavedCheckpoint(
        path=path,
        step=int(manifest["step"]),
        num_ranks=int(manifest["num_ranks"]),
        progress=_read_json(path / _PROGRESS),
    )


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
    return CheckpointError(
        f"{folder} cannot be {done}{where} ({name}: {reason})",
        expected="a folder that every rank may read and write",
        hint="check its owner and permissions, or give another folder for checkpoints",
    )


def _check_sizes(path: Path) -> Mapping[str, Any]:
    manifest = _read_json(path / _MANIFEST)
    sizes = manifest.get("files")
    if manifest.get("version") != _VERSION or not isinstance(sizes, dict):
        raise _damaged(path, f"{_MANIFEST} is of an unknown version")
    missing = []
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            missing.append(
                f"{name}: {'missing' if found is None else f'{found} bytes'}, not {size}"
            )
    if missing or not {_PROGRESS, ".metadata"} <= set(sizes):
        raise _damaged(path, f"{len(missing)} of {len(sizes)} files are not as written", missing)
    match = _STEP_NAME.fullmatch(path.name)
    step, num_ranks = manifest.get("step"), manifest.get("num_ranks")
    if match is None or step != int(match[1]) or not isinstance(num_ranks, int):
        raise _damaged(path, f"{_MANIFEST} is of step {step}")
    return manifest


def _damaged(path: Path, found: str, details: list[str] | None = None) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}",
        expected="a whole training checkpoint",
        hint="remove it; training resumes from the one before",
        details=details or (),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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

    def complete(self, step: int, progress: Mapping[str, Any], *, num_ranks: int) -> Path:
        """Give a checkpoint its name; all its tensors are on the disk.

        Raises:
            CheckpointError: A file is not there, or the disk is full.
        """
        partial, final = self._partial(step), self.path / _step_name(step)
        with refuse_os_errors(self.path, "written to"):
            _write_json(partial / _PROGRESS, dict(progress))
            files = [path.name for path in _check_payload(partial).files]
            sizes = {name: (partial / name).stat().st_size for name in sorted([*files, _PROGRESS])}
            manifest = {"version": _VERSION, "step": step, "num_ranks": num_ranks, "files": sizes}
            _write_json(partial / _MANIFEST, manifest)
            sync_folder(partial)
            if final.exists():
                self._replace(partial, final)
            else:
                partial.rename(final)
            sync_folder(self.path)
        return final

    def newest(self, *, before: int | None = None) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint; logs which ones are damaged.

        Args:
            before: Only one of an earlier step.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        with refuse_os_errors(self.path, "read"):
            named = self._named()
        for step, path in reversed(named):
            if before is not None and step >= before:
                continue
            try:
                with refuse_os_errors(path, "read"):
                    return read_saved(path)
            except CheckpointError as error:
                logger.warning("%s is skipped: %s", path, error.found)
        return None

    def prune(self, keep: int, protect: Collection[int] = ()) -> None:
        """Keep the newest `keep` whole checkpoints, and remove older ones.

        Args:
            keep: How many stay.
            protect: Steps that stay as well.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        with refuse_os_errors(self.path, "written to"):
            named = self._named()
            whole = [step for step, path in named if _is_complete(path)]
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
