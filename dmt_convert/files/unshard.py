"""Write the tensors of any checkpoint as one plain `.safetensors` file, streamed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint import (
    DICTS_KEY,
    ITEM_BYTES,
    FlatCheckpoint,
    TensorInfo,
    open_checkpoint,
)
from dmt_convert.errors import CheckpointError, ConfigError, ExportError
from dmt_convert.files.aligned_writer import AlignedWriter
from dmt_convert.files.digest import stream_checked
from dmt_convert.files.safetensors_writer import safetensors_header
from dmt_convert.files.staging import TENSORS, file_exists, staged_file
from dmt_convert.progress import Progress, no_progress

_FORMAT: Final = {"format": "pt"}
"""What libraries that load such files look for: it tells the framework."""
_STATE_KEYS: Final = ("opt", "ema")
"""Beginnings of keys of dicts that hold no model: optimizers, averages of weights."""
_RESERVED: Final = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsharded:
    """What was written."""

    path: Path
    """The file."""
    format: str
    """Container that was read."""
    tensors: tuple[TensorInfo, ...]
    """The tensors, as they are called in the file."""
    passed_over: tuple[str, ...]
    """Tensors that no pattern matched, by their path in the checkpoint."""
    scalars: int
    """How many plain values the checkpoint holds beside them; they were left out."""
    unread: Mapping[str, str]
    """Objects of other kinds, which were left out: what each is, by dotted path."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Unsharded {self.path}: {len(self.tensors)} tensors, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def unshard_checkpoint(
    source: Path,
    out: Path,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    progress: Progress = no_progress,
) -> Unsharded:
    """Write every tensor of a checkpoint to one file, under its trainer's name.

    A tensor's name is its key in its state dict. If a checkpoint holds several dicts, names from
    those that are not the model's begin with the dict's keys, joined by dots. Memory stays small
    whatever the checkpoint's size.

    Args:
        source: Any checkpoint that can be read.
        out: The file to write.
        only: Patterns (`*` and `?` as in a shell) of names or of whole paths; all if empty.
        force: Whether a file that is there may be replaced.
        progress: Called with a step, bytes done and bytes in all.

    Raises:
        CheckpointError: The checkpoint cannot be read, or changed on disk, or two of the tensors
            have one name.
        ConfigError: No tensor fits the patterns.
        ExportError: The target is taken, or the disk is full.
    """
    checkpoint = open_checkpoint(source)
    _check_out(out, checkpoint, force=force)
    named = [*zip(_names(checkpoint.tensors), checkpoint.tensors, strict=True)]
    chosen = [(n, t) for n, t in named if not only or _fits(n, t, only)]
    _check_unique([name for name, _ in chosen])
    passed_over = tuple(t.path for n, t in named if only and not _fits(n, t, only))
    if not chosen:
        raise ConfigError(
            f"no tensor of {source} matches {', '.join(only)}",
            expected="a pattern that matches one of its names",
            hint=f"for example --only '{named[0][0]}'; `dmt inspect` lists them",
        )
    # wide elements first: then every tensor is aligned to its elements
    chosen.sort(key=lambda pair: -ITEM_BYTES[pair[1].dtype])
    total = sum(tensor.nbytes for _, tensor in chosen)
    with staged_file(out, force=force, needed_bytes=total, output=TENSORS) as staging:
        _write(staging, chosen, total, progress)
        checkpoint.check_unchanged()
    return Unsharded(
        path=out,
        format=checkpoint.format,
        tensors=tuple(replace(tensor, name=name, container=()) for name, tensor in chosen),
        passed_over=passed_over,
        scalars=len(checkpoint.scalars),
        unread=checkpoint.unread,
    )


def _fits(name: str, tensor: TensorInfo, only: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(tensor.path, p) for p in only)


def _names(tensors: Sequence[TensorInfo]) -> list[str]:
    """Name tensors as their trainer did; uniquely if their paths are unique."""
    counts = Counter(tensor.container for tensor in tensors)
    model = max(counts, key=lambda keys: (not _is_state(keys), counts[keys]))
    names = [t.name if t.container == model else t.path for t in tensors]
    if len(set(names)) < len(names):
        names = [tensor.path for tensor in tensors]
    return [name or "tensor" for name in names]


def _check_unique(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 or name == _RESERVED]
    if twice:
        raise CheckpointError(
            f"{len(twice)} names of tensors are not unique, or reserved",
            expected="tensors that can be told apart by name in one file",
            hint="write some of them with --only",
            details=twice[:20],
        )


def _is_state(keys: tuple[str, ...]) -> bool:
    return any(key.lower().startswith(_STATE_KEYS) for key in keys)


def _write(
    path: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    total: int,
    progress: Progress,
) -> None:
    """Stream tensors to a new file, one chunk in memory."""
    renamed = [replace(tensor, name=name, container=()) for name, tensor in tensors]
    dicts = {tensor.container: None for name, tensor in tensors if name != tensor.name}
    header = safetensors_header(renamed, {**_FORMAT, DICTS_KEY: json.dumps([*dicts])})
    done = 0
    with AlignedWriter(path, len(header)) as writer:
        for _, tensor in tensors:
            for chunk in stream_checked(tensor, tensor.path):
                writer.write(chunk)
                done += chunk.nbytes
                progress("unsharding", done, total)
    with path.open("r+b", buffering=0) as file:
        view = memoryview(header)
        while len(view):
            view = view[file.write(view) :]


def _check_out(out: Path, checkpoint: FlatCheckpoint, *, force: bool) -> None:
    """Refuse a target that must not be replaced."""
    if not out.parent.is_dir() or out.name in ("", ".."):
        raise ExportError(
            f"the folder {out.parent} does not exist",
            expected="the name of a file to write, in a folder that exists",
            hint=f"mkdir -p {out.parent}",
        )
    if not os.path.lexists(out):
        return
    if out.is_dir() or out.is_symlink():
        raise ExportError(
            f"{out} is a {'symbolic link' if out.is_symlink() else 'folder'}",
            expected="the name of a file to write",
            hint="name the file, as in --out model.safetensors",
        )
    if any(out.samefile(file) for file in checkpoint.files):
        raise ExportError(
            f"{out} is a file of the checkpoint itself",
            expected="another file to write",
            hint="choose another --out; the checkpoint is never changed",
        )
    if not force:
        raise file_exists(out, TENSORS)
