"""The containers that can be read, and how one is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.dcp_reader import is_dcp, is_dcp_pair, read_dcp, read_dcp_pair
from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint
from dmt_convert.checkpoint.held_files import holding
from dmt_convert.checkpoint.indexed_reader import is_indexed, read_indexed
from dmt_convert.checkpoint.safetensors_reader import is_safetensors, read_safetensors
from dmt_convert.checkpoint.torch_reader import is_torch_file, read_torch
from dmt_convert.checkpoint.torchsnapshot_reader import is_torchsnapshot, read_torchsnapshot
from dmt_convert.checkpoint.trainer_folders import (
    is_fuxictr,
    is_hugectr,
    is_nvidia,
    is_torcheasyrec,
    read_fuxictr,
    read_hugectr,
    read_nvidia,
    read_torcheasyrec,
)
from dmt_convert.errors import CheckpointError
from dmt_convert.readers import Reader, with_plugins

READERS: Final[tuple[Reader[FlatCheckpoint], ...]] = (
    Reader(format="indexed", can_read=is_indexed, read=read_indexed),
    Reader(format="fuxictr", can_read=is_fuxictr, read=read_fuxictr),
    Reader(format="torcheasyrec", can_read=is_torcheasyrec, read=read_torcheasyrec),
    Reader(format="hugectr", can_read=is_hugectr, read=read_hugectr),
    Reader(format="safetensors", can_read=is_safetensors, read=read_safetensors),
    Reader(format="dcp", can_read=is_dcp, read=read_dcp),
    Reader(format="dcp-pair", can_read=is_dcp_pair, read=read_dcp_pair),
    Reader(format="torchsnapshot", can_read=is_torchsnapshot, read=read_torchsnapshot),
    Reader(format="nvidia-dlrm", can_read=is_nvidia, read=read_nvidia),
    Reader(format="torch", can_read=is_torch_file, read=read_torch),
)
"""All built-in containers. They are asked in this order, after those of plugins."""
ENTRY_POINTS: Final = "dmt_convert.readers"
"""Group of entry points to which other distributions add a `Reader[FlatCheckpoint]`."""


def open_checkpoint(path: str | Path) -> FlatCheckpoint:
    """Open a checkpoint: its headers are read, its weights are not.

    Raises:
        CheckpointError: Nothing is there, nothing can read it, or it is damaged.
        ConfigError: A reader of an installed plugin is broken.
    """
    path = Path(path)
    try:
        with holding(path) as files:
            checkpoint = _open(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read ({error.strerror or error})",
            expected="files that you may read",
            hint="check the path and its permissions",
        ) from None
    _check_names(checkpoint)
    held = tuple(file for file in files.values() if file is not None)
    return replace(checkpoint, held=held)


def _open(path: Path) -> FlatCheckpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist",
            expected="a checkpoint file or directory",
            hint=f"look into {path.parent}" if path.parent.exists() else "check the path",
        )
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(
            f"{path} is empty (0 bytes)",
            expected="a checkpoint",
            hint="the save did not finish; use the previous checkpoint",
        )
    readers = with_plugins(READERS, group=ENTRY_POINTS, opens=FlatCheckpoint)
    for reader in readers:
        if reader.can_read(path):
            checkpoint = reader.read(path)
            if not checkpoint.tensors:
                raise CheckpointError(
                    f"{path} ({reader.format}) does not hold any tensor",
                    expected="a state dict with the model's weights",
                    hint="save the weights: torch.save(model.state_dict(), 'weights.pt')",
                )
            return checkpoint
    raise _unknown(path, readers)


def _check_names(checkpoint: FlatCheckpoint) -> None:
    """Refuse names that cannot be written to a file or a terminal (lone surrogates)."""
    for tensor in checkpoint.tensors:
        try:
            tensor.path.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{checkpoint.source} holds a tensor named {ascii(tensor.path)[:80]}",
                expected="names that are text",
                hint="the file is damaged; copy it again",
            ) from None


def _unknown(path: Path, readers: tuple[Reader[FlatCheckpoint], ...]) -> CheckpointError:
    formats = ", ".join(reader.format for reader in readers)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if any(r.can_read(p) for r in readers))
        names = ", ".join(p.name for p in inside[:5])
        hint = f"name one of: {names}" if inside else "name the checkpoint itself"
        found = f"{path} is a directory, and not a checkpoint of a known kind"
        if (path / "dmt.json").is_file():
            found = f"{path} is a bundle, not a flat checkpoint"
            hint = "give the checkpoint that it was converted from"
    else:
        with path.open("rb") as file:
            head = file.read(8)
        found = f"{path} begins with the bytes {head.hex(' ')}"
        hint = "if it is whole, save the weights with torch.save or safetensors"
    return CheckpointError(found, expected=f"one of the formats {formats}", hint=hint)
