"""Folders that are no checkpoint by themselves, but hold one or its parts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint
from dmt_convert.checkpoint.readers.file_sets import join_folder
from dmt_convert.errors import CheckpointError

_STATE: Final = re.compile(
    r"(?i)(.*[-_.])?(optim|optimizer|optimizers|scheduler|rng|random|scaler|sampler)([-_.].*)?"
    r"|.*optim_states.*|random_states.*|training_args.*"
)
"""Names of files with what a training keeps beside the model."""
_MAX_FILES: Final = 10_000
_MAX_OPENED: Final = 20
_DEEPSPEED: Final = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")

_log = logging.getLogger(__name__)

_Read = Callable[[Path], FlatCheckpoint | None]


def open_folder(folder: Path, read: _Read) -> FlatCheckpoint:
    """Open the one checkpoint that a folder holds: a file, a set of files, or a folder in it.

    Args:
        folder: A folder that no reader knows.
        read: Reads a path with the files that belong to it; None if no reader knows it.

    Raises:
        CheckpointError: It holds none, or several.
    """
    _refuse_own(folder)
    _check_deepspeed(folder)
    opened = _open_inside(folder, read)
    if len(opened) > 1:
        joined = None if len(opened) > _MAX_OPENED else join_folder(folder, opened)
        if joined is None:
            raise _several(folder, opened)
        opened = [joined]
    if not opened:
        raise _nothing(folder, read)
    _log.info("%s holds one checkpoint: %s", folder, opened[0].source)
    return opened[0]


def _open_inside(folder: Path, read: _Read) -> list[FlatCheckpoint]:
    """Open what lies in a folder; a file that belongs to another's checkpoint counts once."""
    inside = sorted(folder.iterdir())[:_MAX_FILES]
    models = [path for path in inside if not _STATE.fullmatch(path.name)]
    opened: list[FlatCheckpoint] = []
    for paths in (models, inside):
        covered: set[Path] = set()
        for path in paths:
            if path in covered or not (path.is_file() or path.is_dir()):
                continue
            checkpoint = read(path)
            if checkpoint is not None:
                opened.append(checkpoint)
                covered |= {*checkpoint.files}
            if len(opened) > _MAX_OPENED:
                break
        if opened:
            break
    return opened


def _several(folder: Path, opened: list[FlatCheckpoint]) -> CheckpointError:
    paths = [checkpoint.source for checkpoint in opened]
    names = [str(path) for path in paths]
    more = " and others" if len(names) > _MAX_OPENED else ""
    return CheckpointError(
        f"{folder} is a directory, and holds several checkpoints: "
        + ", ".join(path.name for path in paths[:5])
        + (", ..." if len(paths) > 5 else "")
        + more,
        expected="one checkpoint",
        hint="name one of: " + ", ".join(names[:5]) + _hint_at_parts(opened),
    )


def _hint_at_parts(opened: list[FlatCheckpoint]) -> str:
    """Say what to do if some of the files make one model; empty if all hold the same tensors."""
    held = [{tensor.path for tensor in checkpoint.tensors} for checkpoint in opened]
    if all(held[0] & other for other in held[1:]):
        return ""
    return "; if several of them make one model, put these into a folder of their own"


def _nothing(folder: Path, read: _Read) -> CheckpointError:
    deeper = [*_look_deeper(folder, read)]
    if not deeper:
        _refuse_lost_metadata(folder)
    hint = "name the checkpoint itself"
    if deeper:
        hint = "name one of: " + ", ".join(map(str, deeper[:5]))
    return CheckpointError(
        f"{folder} is a directory, and not a checkpoint of a known kind",
        expected="a checkpoint: a file of torch.save or safetensors, or a folder of a trainer",
        hint=hint,
    )


def _look_deeper(folder: Path, read: _Read) -> Iterator[Path]:
    """Yield what can be read two levels down."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir())[:_MAX_OPENED]:
        try:
            found = _open_inside(inner, read)
        except (CheckpointError, OSError):
            continue
        yield from (checkpoint.source for checkpoint in found)


def _refuse_own(folder: Path) -> None:
    if (folder / "dmt.json").is_file():
        raise CheckpointError(
            f"{folder} is a bundle, not a flat checkpoint",
            expected="a checkpoint of a trainer",
            hint="give the checkpoint that it was converted from",
        )


def _refuse_lost_metadata(folder: Path) -> None:
    """Refuse a torchsnapshot without its hidden file: folders named by rank hold raw bytes."""
    ranks = [path for path in folder.iterdir() if path.is_dir() and _is_payload(path)]
    if ranks:
        raise CheckpointError(
            f"{folder} looks like a torchsnapshot (it holds {ranks[0].name}/) without its "
            ".snapshot_metadata",
            expected="the hidden file .snapshot_metadata, which says what lies where",
            hint="copies by * leave hidden files behind: copy that file too (cp -r FOLDER, or "
            "cp FOLDER/.snapshot_metadata); if it never was there, the save did not finish",
        )


def _is_payload(folder: Path) -> bool:
    if folder.name in ("sharded", "replicated", "batched"):
        return True
    return folder.name.isdecimal() and folder.name.isascii()


def refuse_partitioned(path: Path) -> CheckpointError | None:
    """Refuse a file of DeepSpeed's stage 3, of which every rank has its own; None for others."""
    if not path.name.startswith("zero_pp_rank_") or not _DEEPSPEED.fullmatch(path.name):
        return None
    folder = path.parent
    return CheckpointError(
        f"{path} is one rank's file of DeepSpeed, whose stage 3 cuts the weights over all ranks",
        expected="one file with the weights of the whole model",
        hint=f"join them: python {folder.parent / 'zero_to_fp32.py'} {folder.parent} weights",
    )


def _check_deepspeed(folder: Path) -> None:
    """Point at the weights in a folder of DeepSpeed, and refuse what its stage 3 cut."""
    latest = folder / "latest"
    step = folder
    if latest.is_file() and latest.stat().st_size < 1000:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if name and Path(name).name == name and (folder / name).is_dir():
            step = folder / name
    found = sorted(path for path in step.iterdir() if _DEEPSPEED.fullmatch(path.name))
    if not found:
        return
    expected = "one file with the weights of the whole model"
    cut = [path for path in found if path.name.startswith("zero_pp_rank_")]
    whole = [path for path in found if path not in cut]
    if cut or len(whole) > 1:
        raise CheckpointError(
            f"{folder} is a checkpoint of DeepSpeed whose weights are cut over "
            f"{len(cut or whole)} ranks",
            expected=expected,
            hint=f"join them: python {folder / 'zero_to_fp32.py'} {folder} weights",
        )
    raise CheckpointError(
        f"{folder} is a checkpoint of DeepSpeed, with the optimizer's files beside the weights",
        expected=expected,
        hint=f"name the weights: {whole[0]}",
    )
