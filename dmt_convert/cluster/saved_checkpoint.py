"""A training checkpoint on the disk: its names, and whether it is whole. No torch.

```
step_000000100/
  manifest.json                  every other file and its size; written last
  progress.json                  what the training loop keeps beside its tensors
  .metadata, __0_0.distcp, ...   written by torch.distributed.checkpoint
```
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint import FlatCheckpoint, read_dcp
from dmt_convert.errors import CheckpointError

MANIFEST: Final = "manifest.json"
"""Lists all other files of a checkpoint."""
PROGRESS: Final = "progress.json"
"""What the training loop keeps beside its tensors."""
VERSION: Final = 1
"""Of the layout."""
STEP_NAME: Final = re.compile(r"step_(\d{9,})")
"""Names of checkpoints."""


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


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:09d}"


def is_complete(path: Path) -> bool:
    """Tell whether a checkpoint's files have the sizes that its manifest lists."""
    try:
        _check_sizes(path)
    except CheckpointError:
        return False
    return True


def read_saved(path: Path) -> SavedCheckpoint:
    """Describe a checkpoint, where it is whole.

    Raises:
        CheckpointError: It is not.
    """
    manifest = _check_sizes(path)
    read_payload(path)
    return SavedCheckpoint(
        path=path,
        step=int(manifest["step"]),
        num_ranks=int(manifest["num_ranks"]),
        progress=_read_json(path / PROGRESS),
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
    """Turn what the file system refuses into a refusal that says so.

    Args:
        folder: Of the checkpoints.
        done: What could not be done with it.
    """
    try:
        yield
    except OSError as error:
        raise os_refusal(error, folder, done) from None


def os_refusal(error: OSError, folder: Path, done: str, *, where: str = "") -> CheckpointError:
    """Say what the file system refused.

    Args:
        error: The refusal.
        folder: Of the checkpoints.
        done: What could not be done with it.
        where: On which rank, where that matters.
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"the disk of {folder} is full{where} ({reason})",
            expected="room for one training checkpoint more than are kept",
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
    manifest = _read_json(path / MANIFEST)
    sizes = manifest.get("files")
    if manifest.get("version") != VERSION or not isinstance(sizes, dict):
        raise _damaged(path, f"{MANIFEST} is of an unknown version")
    missing = []
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            missing.append(
                f"{name}: {'missing' if found is None else f'{found} bytes'}, not {size}"
            )
    if missing or not {PROGRESS, ".metadata"} <= set(sizes):
        raise _damaged(path, f"{len(missing)} of {len(sizes)} files are not as written", missing)
    match = STEP_NAME.fullmatch(path.name)
    step, num_ranks = manifest.get("step"), manifest.get("num_ranks")
    if match is None or step != int(match[1]) or not isinstance(num_ranks, int):
        raise _damaged(path, f"{MANIFEST} is of step {step}")
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
