"""The containers that can be read, and how one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

from dmt_convert.checkpoint.dcp_reader import DcpPairReader, DcpReader
from dmt_convert.checkpoint.flat_checkpoint import FlatCheckpoint
from dmt_convert.checkpoint.fuxictr_reader import FuxictrReader
from dmt_convert.checkpoint.hugectr_reader import HugectrReader
from dmt_convert.checkpoint.indexed_reader import IndexedReader
from dmt_convert.checkpoint.nvidia_reader import NvidiaReader
from dmt_convert.checkpoint.safetensors_reader import SafetensorsReader
from dmt_convert.checkpoint.torch_reader import TorchReader
from dmt_convert.checkpoint.torcheasyrec_reader import TorchEasyRecReader
from dmt_convert.checkpoint.torchsnapshot_reader import TorchsnapshotReader
from dmt_convert.errors import CheckpointError


class Reader(Protocol):
    """How the bytes of one container become named tensors."""

    format: str
    """Name of the container."""

    def can_read(self, path: Path) -> bool:
        """Tell by names and first bytes; never unpickle."""
        ...

    def read(self, path: Path) -> FlatCheckpoint:
        """Read headers only."""
        ...


READERS: Final[tuple[Reader, ...]] = (
    IndexedReader(),
    FuxictrReader(),
    TorchEasyRecReader(),
    HugectrReader(),
    SafetensorsReader(),
    DcpReader(),
    DcpPairReader(),
    TorchsnapshotReader(),
    NvidiaReader(),
    TorchReader(),
)
"""All containers, asked in this order."""


def open_checkpoint(path: Path) -> FlatCheckpoint:
    """Open a checkpoint: its headers are read, its weights are not.

    Raises:
        CheckpointError: Nothing is there, nothing can read it, or it is damaged.
    """
    try:
        checkpoint = _open(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read ({error.strerror or error})",
            expected="files that you may read",
            hint="check the path and its permissions",
        ) from None
    _check_names(checkpoint)
    return checkpoint


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
    for reader in READERS:
        if reader.can_read(path):
            checkpoint = reader.read(path)
            if not checkpoint.tensors:
                raise CheckpointError(
                    f"{path} ({reader.format}) holds no tensor",
                    expected="a state dict with the model's weights",
                    hint="save the weights: torch.save(model.state_dict(), 'weights.pt')",
                )
            return checkpoint
    raise _unknown(path)


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


def _unknown(path: Path) -> CheckpointError:
    formats = ", ".join(reader.format for reader in READERS)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if any(r.can_read(p) for r in READERS))
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
