"""Tensors of all ranks, to and from a folder, through torch.distributed.checkpoint (DCP).

DCP plans who writes which shard, and reshards on loading. Here its files are made to reach the
disk, what a save needs is copied beforehand where training goes on meanwhile, and its metadata,
a pickle, is read without running anything.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.futures import Future

from dmt_convert.checkpoint import FlatCheckpoint

_BUFFER_BYTES: Final = 4 << 20
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


def flatten_tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Give every tensor of nested dicts one name, its keys joined by dots.

    Args:
        state: Dicts of dicts of tensors (plain, DTensor or ShardedTensor); dicts may be empty.

    Raises:
        TypeError: Something else is in it, or a type of tensor that is not read again.
        ValueError: Two tensors have one name.
    """
    flat: dict[str, Tensor] = {}
    _flatten(state, "", flat)
    return flat


def _flatten(state: Mapping[Any, Any], prefix: str, flat: dict[str, Tensor]) -> None:
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _flatten(value, f"{name}.", flat)
        elif not isinstance(value, Tensor) or value.dtype not in _NAMES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} is a {kind}: a checkpoint holds tensors; values are progress")
        elif name in flat:
            raise ValueError(f"two tensors are named {name}")
        else:
            flat[name] = value


def describe_misfits(state: Mapping[str, Tensor], checkpoint: FlatCheckpoint) -> list[str]:
    """Say, one line each, which tensors cannot be loaded from a checkpoint."""
    stored = {info.path: info for info in checkpoint.tensors}
    misfits = []
    for name, tensor in state.items():
        info, shape = stored.get(name), tuple(tensor.shape)
        if info is None:
            misfits.append(f"{name}: missing")
        elif info.shape != shape or info.dtype != _NAMES[tensor.dtype]:
            misfits.append(
                f"{name}: {info.dtype} of shape {list(info.shape)}, not "
                f"{_NAMES[tensor.dtype]} of shape {list(shape)}"
            )
    return misfits


class _SyncedFile(io.BufferedWriter):
    """A file whose descriptor is asked for to sync it: what is buffered goes to the disk before.

    DCP syncs without flushing. What a write raises is kept: `torch.save` turns it into
    something that no longer says that the disk is full.
    """

    def __init__(self, path: Path, errors: list[OSError]) -> None:
        super().__init__(io.FileIO(path, "w"), _BUFFER_BYTES)
        self._errors = errors

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._errors.append(error)
            raise

    def fileno(self) -> int:
        self.flush()
        return super().fileno()


class _SyncedFiles(FileSystem):
    """Local files that reach the disk; remembers what the file system refused."""

    def __init__(self) -> None:
        self.errors: list[OSError] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with _SyncedFile(Path(path), self.errors) as file:
                yield file
        except OSError as error:
            self.errors.append(error)
            raise


class SyncedWriter(FileSystemWriter):
    """Writes a rank's files so that they are on the disk when it is done.

    Args:
        path: The folder; exists, and holds no checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, overwrite=False)
        self.fs = self._files = _SyncedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write; what the file system refused is raised as such.

        Raises:
            OSError: The disk is full, or fails.
        """
        try:
            return super().write_data(plan, planner)
        except Exception:
            if self._files.errors:
                raise self._files.errors[0] from None
            raise


def make_planner() -> DefaultSavePlanner:
    """Plan a save of tensors that have their names already."""
    return DefaultSavePlanner(flatten_state_dict=False)


class StagedPlanner(DefaultSavePlanner):
    """Writes a copy, made now, of what this rank may have to write; training may go on.

    Args:
        state: Tensors by name; the copy is on the CPU and takes what this rank's shards take.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        plain = make_planner()
        plain.set_up_planner(dict(state))
        self._copies: dict[MetadataIndex, Tensor] = {}
        for item in plain.create_local_plan().items:
            data = plain.resolve_data(item)
            assert isinstance(data, Tensor)
            self._copies[item.index] = data.detach().to("cpu", copy=True)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copy of a shard."""
        return self._copies[write_item.index]


class CheckedReader(FileSystemReader):
    """Reads a checkpoint that was opened as data; DCP itself would unpickle its metadata.

    Args:
        checkpoint: The opened checkpoint, from a DCP folder, tensors only.
    """

    def __init__(self, checkpoint: FlatCheckpoint) -> None:
        super().__init__(checkpoint.source)
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Give DCP what it would have unpickled."""
        entries, storage = {}, {}
        for info in self._checkpoint.tensors:
            chunks = []
            for piece in info.pieces:
                place = torch.Size(piece.starts)
                chunks.append(ChunkStorageMetadata(place, torch.Size(piece.sizes)))
                relative = piece.path.relative_to(self._checkpoint.source)
                storage[MetadataIndex(info.path, place)] = _StorageInfo(
                    str(relative), piece.offset, piece.length
                )
            properties = TensorProperties(dtype=_DTYPES[info.dtype])
            entries[info.path] = TensorStorageMetadata(properties, torch.Size(info.shape), chunks)
        return Metadata(
            state_dict_metadata=dict(entries),
            storage_data=storage,
            storage_meta=StorageMeta(load_id=self.load_id),
        )
