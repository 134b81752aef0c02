"""One file of `torch.save`: a zip archive (since torch 1.6) or the older plain pickles."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, Piece
from dmt_convert.checkpoint.inert_objects import StorageRef, TensorRef, UnknownGlobal
from dmt_convert.checkpoint.pickled_content import PickledContent, collect_content
from dmt_convert.checkpoint.safe_unpickler import read_pickle, refuse_global
from dmt_convert.checkpoint.zip_archive import ZipArchive, ZipRecord, read_zip_archive
from dmt_convert.errors import CheckpointError

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """An opened file: its pickle is read, its storages stay on disk."""

    path: Path
    """The file."""
    archive: ZipArchive
    """Where its storages lie."""
    content: PickledContent
    """What its pickle holds."""
    unknown: tuple[str, ...]
    """Globals that the pickle names beside those of plain state dicts."""

    def piece(
        self, tensor: TensorRef, *, name: str, starts: tuple[int, ...] | None = None
    ) -> Piece:
        """Return where a tensor lies.

        Args:
            tensor: One of the file's tensors.
            name: What to call it in errors.
            starts: Index of its first element, where it is a part of a larger one.

        Raises:
            CheckpointError: The file does not hold all of it.
        """
        offset, crc32 = self.archive.locate(tensor, name=name)
        return Piece(
            path=self.path,
            offset=offset,
            length=tensor.extent * ITEM_BYTES[tensor.dtype],
            starts=(0,) * len(tensor.shape) if starts is None else starts,
            sizes=tensor.shape,
            crc32=crc32 if tensor.is_contiguous else None,
            strides=None if tensor.is_contiguous else tensor.strides,
        )


def is_torch_file(path: Path) -> bool:
    """Tell by the first bytes: a zip archive, or a pickle."""
    if not path.is_file() or path.suffix == ".npz":
        return False
    with path.open("rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or (len(head) > 1 and head[0] == 0x80 and head[1] <= 5)


def open_torch_file(path: Path) -> TorchFile:
    """Read the pickle; storages stay on disk, and nothing that the pickle names is run.

    Raises:
        CheckpointError: The file is damaged.
    """
    unknown: dict[str, UnknownGlobal] = {}
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
        archive = read_zip_archive(path) if zipped else _read_legacy(path, file)
    content = read_pickle(io.BytesIO(archive.pickle), source=path, unknown=unknown)
    return TorchFile(
        path=path,
        archive=archive,
        content=collect_content(content, path),
        unknown=tuple(unknown),
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
    unknown: dict[str, UnknownGlobal] = {}
    read_pickle(file, source=path, storages=storages, unknown=unknown)
    end = file.tell()
    order = read_pickle(file, source=path)
    records = _legacy_records(path, file, order, storages, [*unknown])
    file.seek(begin)
    return ZipArchive(path=path, pickle=file.read(end - begin), storages=records)


def _legacy_records(
    path: Path,
    file: BinaryIO,
    order: object,
    storages: dict[str, StorageRef],
    unknown: list[str],
) -> dict[str, ZipRecord]:
    size = path.stat().st_size
    records: dict[str, ZipRecord] = {}
    for key in order if isinstance(order, list) else []:
        head = file.read(8)
        storage = storages.get(key) if isinstance(key, str) else None
        kinds = [name for name in unknown if name.endswith("Storage")]
        if storage is None and kinds:  # its length is not known, nor where the next one begins
            raise refuse_global(path, kinds[0])
        if storage is None or storage.dtype is None or len(head) != 8:
            break
        offset, length = file.tell(), storage.numel * ITEM_BYTES[storage.dtype]
        if struct.unpack("<q", head)[0] != storage.numel or offset + length > size:
            break
        records[key] = ZipRecord(offset=offset, length=length, crc32=None)
        file.seek(offset + length)
    missing = [key for key in storages if key not in records]
    if missing:
        raise CheckpointError(
            f"{path} ends before {len(missing)} of its {len(storages)} storages",
            expected="all storages behind the pickle",
            hint="the file was cut short; copy it again and compare its size",
        )
    return records
