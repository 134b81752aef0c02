"""The folder of training checkpoints as one process sees it: what comes, what goes. No torch.

```
CHECKPOINTS/
  .lock                     held by the training that writes here
  .step_000000200-partial/  being written; left behind by a killed run, removed by the next
  step_000000100/           see saved_checkpoint.py
```

A checkpoint gets its name by one rename, once all its files are on the disk.
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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint import FlatCheckpoint
from dmt_convert.cluster.saved_checkpoint import (
    MANIFEST,
    PROGRESS,
    STEP_NAME,
    VERSION,
    SavedCheckpoint,
    is_complete,
    read_payload,
    read_saved,
    refuse_os_errors,
    step_name,
)
from dmt_convert.errors import CheckpointError
from dmt_convert.files import exchange_folders, sync_folder

logger = logging.getLogger(__name__)

_LEFTOVER: Final = re.compile(r"\.step_\d{9,}-(partial|removed)")
_LOCK_SECONDS: Final = 10.0
"""How long to wait for the lock: processes of a killed run take a moment to go."""


class CheckpointFolder:
    """A folder of checkpoints, for the one process that writes names into it.

    Args:
        path: The folder; made where it is missing.

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
        later = [path for other, path in self._named() if other > step and is_complete(path)]
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
        partial, final = self._partial(step), self.path / step_name(step)
        with refuse_os_errors(self.path, "written to"):
            _write_json(partial / PROGRESS, dict(progress))
            files = [path.name for path in _check_payload(partial).files]
            sizes = {name: (partial / name).stat().st_size for name in sorted([*files, PROGRESS])}
            manifest = {"version": VERSION, "step": step, "num_ranks": num_ranks, "files": sizes}
            _write_json(partial / MANIFEST, manifest)
            sync_folder(partial)
            if final.exists():
                self._replace(partial, final)
            else:
                partial.rename(final)
            sync_folder(self.path)
        return final

    def newest(self, *, before: int | None = None) -> SavedCheckpoint | None:
        """Return the newest checkpoint that is whole; says which ones are not.

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
                logger.warning("%s is passed over: %s", path, error.found)
        return None

    def prune(self, keep: int, protect: Collection[int] = ()) -> None:
        """Keep the newest `keep` checkpoints that are whole; what is older goes.

        Args:
            keep: How many stay.
            protect: Steps that stay as well.

        Raises:
            CheckpointError: The folder cannot be written to.
        """
        with refuse_os_errors(self.path, "written to"):
            named = self._named()
            whole = [step for step, path in named if is_complete(path)]
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
            match = STEP_NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
        return sorted(found)

    def _partial(self, step: int) -> Path:
        return self.path / f".{step_name(step)}-partial"

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; it loses its name first, so that no half of one is ever seen."""
        removed = path.with_name(f".{path.name}-removed")
        if removed.exists():
            shutil.rmtree(removed)
        path.rename(removed)
        shutil.rmtree(removed)

    def _replace(self, partial: Path, final: Path) -> None:
        """Put a checkpoint in the place of an earlier one of the same step."""
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
                    hint="wait for it, end it, or give another folder",
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
