"""Files written by `torch.save`: zip archives (since torch 1.6) and the older plain pickles."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from dmt_convert.checkpoint.flat_checkpoint import (
    ITEM_BYTES,
    FlatCheckpoint,
    Piece,
    Scalar,
    TensorInfo,
)
from dmt_convert.checkpoint.inert_objects import MAX_SIZE, StorageRef, TensorRef
from dmt_convert.checkpoint.safe_unpickler import read_pickle
from dmt_convert.checkpoint.zip_archive import ZipArchive, ZipRecord, read_zip_archive
from dmt_convert.errors import CheckpointError

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_MAX_DEPTH: Final = 32
_MAX_ITEMS: Final = 1_000_000
_MAX_SCALARS: Final = 100_000


class TorchReader:
    """`.pt`, `.pth` and any other file that `torch.save` wrote; never runs what it reads."""

    format = "torch"

    def can_read(self, path: Path) -> bool:
        """Tell by the first bytes: a zip archive, or a pickle."""
        if not path.is_file() or path.suffix == ".npz":
            return False
        with path.open("rb") as file:
            head = file.read(4)
        return head == b"PK\x03\x04" or (len(head) > 1 and head[0] == 0x80 and head[1] <= 5)

    def read(self, path: Path) -> FlatCheckpoint:
        """Read the pickle; storages stay on disk.

        Raises:
            CheckpointError: The file is damaged, or its pickle wants to run code.
        """
        with path.open("rb") as file:
            archive = read_zip_archive(path) if file.read(2) == b"PK" else _read_legacy(path, file)
        content = read_pickle(io.BytesIO(archive.pickle), source=path)
        tensors: list[TensorInfo] = []
        scalars: dict[str, Scalar] = {}
        for keys, value in _walk(content, path):
            if isinstance(value, TensorRef):
                tensors.append(_tensor_info(archive, keys, value))
            elif len(scalars) < _MAX_SCALARS:
                scalars[".".join(keys)] = value
        return FlatCheckpoint(
            source=path,
            format=self.format,
            tensors=tuple(tensors),
            ordered=True,
            files=(path,),
            scalars=scalars,
        )


def _walk(content: object, path: Path) -> Iterator[tuple[tuple[str, ...], TensorRef | Scalar]]:
    """Yield all tensors and plain values of nested dicts and lists with their keys."""
    stack: list[tuple[tuple[str, ...], object]] = [((), content)]
    found = 1
    while stack:
        keys, value = stack.pop()
        found += len(value) if isinstance(value, dict | list | tuple) else 0
        if len(keys) > _MAX_DEPTH or found > _MAX_ITEMS:
            raise CheckpointError(
                f"{path} nests dicts more than {_MAX_DEPTH} deep or holds over {_MAX_ITEMS} items",
                expected="a state dict, or a dict that holds one",
                hint="save only the weights: torch.save(model.state_dict(), 'weights.pt')",
            )
        if isinstance(value, int) and abs(value) >= MAX_SIZE:
            continue
        if isinstance(value, TensorRef | str | int | float | bool) or value is None:
            yield keys, value
        elif isinstance(value, dict):
            items = [((*keys, _key_name(key)), item) for key, item in dict.items(value)]
            stack.extend(reversed(items))
        elif isinstance(value, list | tuple):
            items = [((*keys, str(index)), item) for index, item in enumerate(value)]
            stack.extend(reversed(items))


def _key_name(key: object) -> str:
    return str(key) if isinstance(key, str) or (type(key) is int and abs(key) < MAX_SIZE) else "?"


def _tensor_info(archive: ZipArchive, keys: tuple[str, ...], tensor: TensorRef) -> TensorInfo:
    name = keys[-1] if keys else ""
    offset, crc32 = archive.locate(tensor, name=".".join(keys))
    piece = Piece(
        path=archive.path,
        offset=offset,
        length=tensor.extent * ITEM_BYTES[tensor.dtype],
        starts=(0,) * len(tensor.shape),
        sizes=tensor.shape,
        crc32=crc32 if tensor.is_contiguous else None,
        strides=None if tensor.is_contiguous else tensor.strides,
    )
    return TensorInfo(
        name=name, container=keys[:-1], dtype=tensor.dtype, shape=tensor.shape, pieces=(piece,)
    )


def _read_legacy(path: Path, file: BinaryIO) -> ZipArchive:
    """Read the format before torch 1.6: five pickles, then the storages one after the other.

    Source: `torch/serialization.py`, `_legacy_save`.
    """
    file.seek(0)
    magic = read_pickle(file, source=path)
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(
            f"{path} is a pickle, but not one that torch.save wrote",
            expected="a checkpoint written by torch.save",
            hint="load it where it was written and save it with torch.save",
        )
    read_pickle(file, source=path)  # protocol version
    system = read_pickle(file, source=path)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CheckpointError(
            f"{path} was written on a big-endian machine",
            expected="a little-endian file",
            hint="load it where it was written and save it again on this kind of machine",
        )
    begin = file.tell()
    storages: dict[str, StorageRef] = {}
    read_pickle(file, source=path, storages=storages)
    end = file.tell()
    order = read_pickle(file, source=path)
    records = _legacy_records(path, file, order, storages)
    file.seek(begin)
    return ZipArchive(path=path, pickle=file.read(end - begin), storages=records)


def _legacy_records(
    path: Path, file: BinaryIO, order: object, storages: dict[str, StorageRef]
) -> dict[str, ZipRecord]:
    size = path.stat().st_size
    records: dict[str, ZipRecord] = {}
    for key in order if isinstance(order, list) else []:
        head = file.read(8)
        storage = storages.get(str(key))
        if storage is None or storage.dtype is None or len(head) != 8:
            break
        offset, length = file.tell(), storage.numel * ITEM_BYTES[storage.dtype]
        if struct.unpack("<q", head)[0] != storage.numel or offset + length > size:
            break
        records[str(key)] = ZipRecord(offset=offset, length=length, crc32=None)
        file.seek(offset + length)
    missing = [key for key in storages if key not in records]
    if missing:
        raise CheckpointError(
            f"{path} ends before {len(missing)} of its {len(storages)} storages",
            expected="all storages behind the pickle",
            hint="the file was cut short; copy it again and compare its size",
        )
    return records
