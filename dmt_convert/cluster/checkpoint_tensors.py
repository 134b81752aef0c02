"""Tensors of all ranks, to and from a folder, through torch.distributed.checkpoint (DCP).

DCP plans which rank writes which shard, and reshards on loading. Here its files are made to reach
the disk, an asynchronous save copies what it needs beforehand, and DCP's metadata, a pickle, is
read without running anything. Tables can be streamed out of a checkpoint, however TorchRec had
sharded them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
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

from dmt_convert.checkpoint import ByteRows, FlatCheckpoint, TensorInfo, stream_tensor
from dmt_convert.cluster.checkpoint_folder import read_payload
from dmt_convert.errors import CheckpointError
from dmt_convert.files import TensorSource, TreeDigest
from dmt_convert.spec import TableSpec

K = TypeVar("K")

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
_FLOATS: Final = ("fp64", "fp32", "fp16", "bf16")
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

    DCP syncs without flushing, and writes from the beginning to the end: the digest is of what was
    to be written, whatever the disk makes of it. What a write raises is kept: `torch.save` turns
    it into something that no longer says that the disk is full.
    """

    def __init__(self, path: Path, errors: list[OSError]) -> None:
        super().__init__(io.FileIO(path, "w"), _BUFFER_BYTES)
        self._errors = errors
        self.digest = TreeDigest()

    def write(self, data: Any, /) -> int:
        try:
            count = super().write(data)
        except OSError as error:
            self._errors.append(error)
            raise
        assert count == len(data)
        self.digest.update(np.frombuffer(data, dtype=np.uint8))
        return count

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("a checkpoint is written from its beginning to its end")

    def fileno(self) -> int:
        self.flush()
        return super().fileno()


class _SyncedFiles(FileSystem):
    """Local files that reach the disk; remembers what the file system refused."""

    def __init__(self) -> None:
        self.errors: list[OSError] = []
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with _SyncedFile(Path(path), self.errors) as file:
                yield file
            self.digests[Path(path).name] = file.digest.finish()
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

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the files that this rank has written, by name."""
        return self._files.digests

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
        shards: dict[MetadataIndex, Tensor] = {}
        for item in plain.create_local_plan().items:
            data = plain.resolve_data(item)
            assert isinstance(data, Tensor)
            shards[item.index] = data.detach()
        self._copies = copy_to_cpu(shards)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copy of a shard."""
        return self._copies[write_item.index]


def copy_to_cpu(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Copy tensors to CPU memory; from a GPU into pinned memory, all at once.

    A copy into pageable memory would go through a small buffer of the driver, and wait each time.
    """
    copies: dict[K, Tensor] = {}
    for key, tensor in tensors.items():
        copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[key].copy_(tensor, non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


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


def open_tables(checkpoint: Path, tables: Iterable[TableSpec]) -> dict[str, TensorInfo]:
    """Find tables in a training checkpoint; nothing but its metadata is read.

    Tables are known by the end of their names, `embedding_bags.TABLE.weight`, as TorchRec's modules
    have them; what is before is the modules around them.

    Args:
        checkpoint: Its folder.
        tables: Which tables, in which shapes.

    Returns:
        Table -> its tensor. `stream_tensor` and `gather_rows` read it in little memory, whether it
        was sharded by rows, by columns, by both, or not at all.

    Raises:
        CheckpointError: It is damaged, or has not these tables in these shapes, once each.
    """
    named: dict[str, list[TensorInfo]] = {}
    for info in read_payload(checkpoint).tensors:
        name = _table_name(info.path)
        if name is not None:
            named.setdefault(name, []).append(info)
    found, faults = {}, []
    for table in tables:
        infos = named.get(table.name, [])
        shape = (table.rows, table.dim)
        if len(infos) == 1 and infos[0].shape == shape and infos[0].dtype in _FLOATS:
            found[table.name] = infos[0]
        else:
            faults.append(f"{table.name} of shape {list(shape)}: {_describe(infos)}")
    if faults:
        raise CheckpointError(
            f"{checkpoint} lacks {len(faults)} of the {len(found) + len(faults)} tables",
            expected="every table of the model once, under a name ending in "
            "embedding_bags.TABLE.weight",
            hint="give a checkpoint of this model",
            details=faults,
        )
    return found


def table_source(name: str, info: TensorInfo, *, dtype: str, origin: str) -> TensorSource:
    """Make what a bundle's weights file is written from.

    Args:
        name: Name in the file.
        info: The table in the checkpoint.
        dtype: What it is stored in: fp32, fp16 or bf16; values are rounded to nearest.
        origin: What to call it in errors.
    """
    return TensorSource(
        name=name,
        dtype=dtype,
        shape=info.shape,
        chunks=lambda: _stream_as(info, dtype),
        origin=origin,
    )


def _stream_as(info: TensorInfo, dtype: str) -> Iterator[ByteRows]:
    if info.dtype == dtype:
        yield from stream_tensor(info)
        return
    for chunk in stream_tensor(info):
        values = torch.frombuffer(bytearray(chunk.data), dtype=_DTYPES[info.dtype])
        yield values.to(_DTYPES[dtype]).view(torch.uint8).numpy()


def _table_name(path: str) -> str | None:
    """Return the table whose weights a tensor holds; None for any other tensor."""
    head, mark, name = path.rpartition(".weight")[0].rpartition("embedding_bags.")
    whole = path.endswith(".weight") and mark and (not head or head.endswith("."))
    return name if whole and name else None


def _describe(infos: list[TensorInfo]) -> str:
    if not infos:
        return "missing"
    return " and ".join(f"{info.path}, {info.dtype} of shape {list(info.shape)}" for info in infos)
