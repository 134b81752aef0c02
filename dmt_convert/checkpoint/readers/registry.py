"""The containers that can be read, and how one is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint
from dmt_convert.checkpoint.held_files import holding
from dmt_convert.checkpoint.identify import (
    refuse_remote,
    refuse_special,
    refuse_unknown_file,
)
from dmt_convert.checkpoint.readers.dcp_reader import is_dcp, is_dcp_pair, read_dcp, read_dcp_pair
from dmt_convert.checkpoint.readers.file_sets import find_parts, join_parts, read_safetensors_file
from dmt_convert.checkpoint.readers.folders import open_folder, refuse_partitioned
from dmt_convert.checkpoint.readers.indexed_reader import is_indexed, read_indexed
from dmt_convert.checkpoint.readers.safetensors_reader import is_safetensors
from dmt_convert.checkpoint.readers.torch_reader import is_torch_file, read_torch
from dmt_convert.checkpoint.readers.torchsnapshot_reader import is_torchsnapshot, read_torchsnapshot
from dmt_convert.checkpoint.readers.trainer_folders import (
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
    Reader(format="safetensors", can_read=is_safetensors, read=read_safetensors_file),
    Reader(format="dcp", can_read=is_dcp, read=read_dcp),
    Reader(format="dcp-pair", can_read=is_dcp_pair, read=read_dcp_pair),
    Reader(format="torchsnapshot", can_read=is_torchsnapshot, read=read_torchsnapshot),
    Reader(format="nvidia-dlrm", can_read=is_nvidia, read=read_nvidia),
    Reader(format="torch", can_read=is_torch_file, read=read_torch),
)
"""All built-in containers. They are asked in this order, after those of plugins."""
ENTRY_POINTS: Final = "dmt_convert.readers"
"""Group of entry points to which other distributions add a `Reader[FlatCheckpoint]`."""
_MAX_LISTED: Final = 20
_SAVE_ARRAYS: Final = (
    "save tensors: torch.save({name: torch.from_numpy(array) for name, array in state.items()}, "
    "'weights.pt')"
)
_FLAT_PARAMETERS: Final = ("_flat_param", "flat_param")


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
    refusal = refuse_remote(path)
    if refusal is None and not path.exists():
        refusal = CheckpointError(
            f"{path} does not exist",
            expected="a checkpoint file or directory",
            hint=f"look into {path.parent}" if path.parent.exists() else "check the path",
        )
    if refusal is None:
        refusal = refuse_special(path) or refuse_partitioned(path)
    if refusal is None and path.is_file() and path.stat().st_size == 0:
        refusal = CheckpointError(
            f"{path} is empty (0 bytes)",
            expected="a checkpoint",
            hint="the save did not finish; use the previous checkpoint",
        )
    if refusal is not None:
        raise refusal
    readers = with_plugins(READERS, group=ENTRY_POINTS, opens=FlatCheckpoint)
    checkpoint = _read(path, readers)
    if checkpoint is None and path.is_dir():
        checkpoint = open_folder(path, lambda inside: _read(inside, readers))
    if checkpoint is None:
        raise refuse_unknown_file(path)
    return checkpoint


def _read(path: Path, readers: tuple[Reader[FlatCheckpoint], ...]) -> FlatCheckpoint | None:
    """Read a path, and the files that are parts of the same whole; None if no reader knows it."""
    reader = next((reader for reader in readers if reader.can_read(path)), None)
    if reader is None:
        return None
    checkpoint = reader.read(path)
    if checkpoint.files == (path,):  # else the reader has found what belongs together
        parts = find_parts(path)
        if len(parts) > 1:
            checkpoint = join_parts([reader.read(part) for part in parts])
    if not checkpoint.tensors:
        raise _no_tensor(path, reader.format, checkpoint)
    return checkpoint


def _no_tensor(path: Path, reader: str, checkpoint: FlatCheckpoint) -> CheckpointError:
    """Say what is there instead of tensors."""
    details = [f"{name or 'the whole'}: {what}" for name, what in checkpoint.unread.items()]
    more = len(details) - _MAX_LISTED
    return CheckpointError(
        f"{path} ({reader}) does not hold any tensor that can be read"
        + (f", but {len(details)} other objects" if details else ""),
        expected="a state dict with the model's weights, as dense tensors of floats or integers",
        hint=_SAVE_ARRAYS
        if any("numpy array" in what for what in checkpoint.unread.values())
        else "save the weights: torch.save(model.state_dict(), 'weights.pt')",
        details=details[:_MAX_LISTED] + ([f"... and {more} more"] if more > 0 else []),
    )


def _check_names(checkpoint: FlatCheckpoint) -> None:
    """Refuse names that cannot be written (lone surrogates), and those of FSDP's flat parameters.

    Every rank holds a slice of these, which are all weights of a module one after the other.
    """
    for path in (*(tensor.path for tensor in checkpoint.tensors), *checkpoint.unread):
        if path.rpartition(".")[2] in _FLAT_PARAMETERS:
            raise CheckpointError(
                f"{checkpoint.source} holds FSDP's flat parameters, which are no tensors of the "
                f"model: {path}",
                expected="the model's own tensors",
                hint="save with StateDictType.FULL_STATE_DICT, or with get_model_state_dict and "
                "torch.distributed.checkpoint.save",
            )
        try:
            path.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{checkpoint.source} holds a tensor named {ascii(path)[:80]}",
                expected="names that are text",
                hint="the file is damaged; copy it again",
            ) from None
