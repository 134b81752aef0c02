"""Where the storages of one `torch.save` file lie, without reading them.

Since version 1.6 torch writes a zip archive whose records are uncompressed and aligned, so that a
storage is a plain byte range of the file. Before, it wrote five pickles and then the storages one
after the other; either way the result is a `TorchArchive`.
Source: `torch/csrc/caffe2/serialize/inline_container.cc` and `torch/serialization.py`, the ZIP
application note.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, Piece
from dmt_convert.checkpoint.identify import refuse_other_zip
from dmt_convert.checkpoint.inert import (
    StorageRef,
    TensorRef,
    UnknownGlobal,
    read_pickle,
    refuse_global,
)
from dmt_convert.errors import CheckpointError
from dmt_convert.zip_members import member_offset

_MAX_RECORD_BYTES: Final = 1 << 30
_MAX_REPEATED_BYTES: Final = 1 << 26
"""How much larger than its storage a tensor may be that repeats elements (`Tensor.expand`)."""
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRange:
    """Where the bytes of one storage lie."""

    offset: int
    """Where they begin in the file, in bytes."""
    length: int
    """How many there are."""
    crc32: int | None
    """Their checksum, or None if the archive was written without checksums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchArchive:
    """The pickle of one `torch.save` file (or part of a file), and where its storages lie."""

    path: Path
    """The file it is (part of)."""
    pickle: bytes
    """The pickle of what was saved."""
    storages: dict[str, StorageRange]
    """Storages by key."""

    def piece(
        self, tensor: TensorRef, *, name: str, starts: tuple[int, ...] | None = None
    ) -> Piece:
        """Return where a tensor lies.

        Args:
            tensor: One of the archive's tensors.
            name: What to call it in errors.
            starts: Index of its first element, if it is a part of a larger one.

        Raises:
            CheckpointError: The storage is missing or too short for the tensor, or the tensor
                repeats it many times over.
        """
        storage = self.storages.get(tensor.storage.key)
        item = ITEM_BYTES[tensor.dtype]
        begin, need = tensor.offset * item, tensor.extent * item
        if storage is None or storage.length < begin + need:
            have = "no storage" if storage is None else f"a storage of {storage.length} bytes"
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} has {have}",
                expected=f"a storage of at least {begin + need} bytes",
                hint="the file is damaged or was not written whole; copy it again",
            )
        if tensor.numel * item > storage.length + _MAX_REPEATED_BYTES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} repeats a storage of "
                f"{storage.length} bytes",
                expected="tensors whose elements the file holds",
                hint="save it with .clone(); if it was not expanded, the file is damaged",
            )
        whole = begin == 0 and need == storage.length and tensor.is_contiguous
        return Piece(
            path=self.path,
            offset=storage.offset + begin,
            length=need,
            starts=(0,) * len(tensor.shape) if starts is None else starts,
            sizes=tensor.shape,
            crc32=storage.crc32 if whole else None,  # a checksum is one of all the bytes
            strides=None if tensor.is_contiguous else tensor.strides,
        )


class _FileSlice(io.RawIOBase):
    """A byte range of a file as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_zip_archive(path: Path, *, start: int = 0, length: int | None = None) -> TorchArchive:
    """Read the directory and the pickle of a `torch.save` archive.

    Args:
        path: The file.
        start: Where the archive begins in it, in bytes.
        length: How many bytes it takes; None: up to the end of the file.

    Raises:
        CheckpointError: It is not such an archive, is damaged, or was repacked compressed.
    """
    size = path.stat().st_size
    length = size - start if length is None else length
    if start < 0 or length < 0 or start + length > size:
        raise CheckpointError(
            f"{path} has {size} bytes",
            expected=f"at least {start + length} bytes",
            hint="the file was cut short; copy it again",
        )
    try:
        with (
            _FileSlice(path, start, length) as raw,
            zipfile.ZipFile(io.BufferedReader(raw)) as archive,
        ):
            return _read_records(path, start, archive)
    except (
        zipfile.BadZipFile,
        struct.error,
        NotImplementedError,
        UnicodeError,
        EOFError,
        OverflowError,
        ValueError,
        zlib.error,
    ) as error:
        raise CheckpointError(
            f"{path} is not a whole torch.save archive ({error})",
            expected="a zip archive with data.pkl and its storages, as torch.save writes it",
            hint="the file is damaged or was cut short; copy it again and compare its size",
        ) from None


def _read_records(path: Path, start: int, archive: zipfile.ZipFile) -> TorchArchive:
    members = archive.infolist()
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if not pickles and not start:
        raise refuse_other_zip(path, [member.filename for member in members])
    if len(pickles) != 1:
        raise zipfile.BadZipFile(f"{len(pickles)} records data.pkl")
    root = pickles[0].filename.removesuffix("data.pkl")
    # code of scripted modules is compressed; it is never read
    used = tuple(f"{root}{name}" for name in ("data.pkl", "data/", "byteorder"))
    compressed = [
        m.filename
        for m in members
        if m.compress_type != zipfile.ZIP_STORED and m.filename.startswith(used)
    ]
    if compressed:
        raise zipfile.BadZipFile(f"record {compressed[0]} is compressed; torch stores them raw")
    order = next((m for m in members if m.filename == f"{root}byteorder"), None)
    if order is not None and _read_record(archive, order).strip() != b"little":
        raise zipfile.BadZipFile("written on a big-endian machine")
    prefix = f"{root}data/"
    storages = {
        member.filename.removeprefix(prefix): StorageRange(
            offset=start + member_offset(archive, member),
            length=member.file_size,
            crc32=member.CRC or None,
        )
        for member in members
        if member.filename.startswith(prefix)
    }
    return TorchArchive(path=path, pickle=_read_record(archive, pickles[0]), storages=storages)


def _read_record(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read a record and compare its checksum; 0 says that none was computed.

    `torch.serialization.set_crc32_options(False)` leaves all at 0, and `skip_data` those of the
    records that are to be filled later.
    """
    if member.file_size > _MAX_RECORD_BYTES:
        raise zipfile.BadZipFile(f"record {member.filename} of {member.file_size} bytes")
    assert archive.fp is not None
    archive.fp.seek(member_offset(archive, member))
    data = archive.fp.read(member.file_size)
    if len(data) != member.file_size:
        raise zipfile.BadZipFile(f"record {member.filename} is cut short")
    if member.CRC and zlib.crc32(data) != member.CRC:
        raise zipfile.BadZipFile(f"record {member.filename} has a wrong checksum")
    return data


def read_legacy_archive(path: Path, file: BinaryIO) -> TorchArchive:
    """Read the format before torch 1.6: five pickles, then the storages one after the other.

    Args:
        path: The file, for errors.
        file: The same, opened at its beginning.

    Raises:
        CheckpointError: It is a pickle of something else, is damaged, or is big-endian.
    """
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
    ranges = _legacy_storages(path, file, order, storages, [*unknown])
    file.seek(begin)
    return TorchArchive(path=path, pickle=file.read(end - begin), storages=ranges)


def _legacy_storages(
    path: Path,
    file: BinaryIO,
    order: object,
    storages: dict[str, StorageRef],
    unknown: list[str],
) -> dict[str, StorageRange]:
    size = path.stat().st_size
    ranges: dict[str, StorageRange] = {}
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
        ranges[key] = StorageRange(offset=offset, length=length, crc32=None)
        file.seek(offset + length)
    missing = [key for key in storages if key not in ranges]
    if missing:
        raise CheckpointError(
            f"{path} ends before {len(missing)} of its {len(storages)} storages",
            expected="all storages behind the pickle",
            hint="the file was cut short; copy it again and compare its size",
        )
    return ranges
