"""Where the records of a `torch.save` archive lie, without reading them.

torch stores records uncompressed and aligned, so a storage is a plain byte range of the file.
Source: `torch/csrc/caffe2/serialize/inline_container.cc` (layout), the ZIP application note.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES
from dmt_convert.checkpoint.inert_objects import TensorRef
from dmt_convert.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30
_MAX_RECORD_BYTES = 1 << 30
_MAX_REPEATED_BYTES = 1 << 26
"""How much larger than its storage a tensor may be that repeats elements (`Tensor.expand`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipRecord:
    """One stored member of an archive."""

    offset: int
    """Where its data begins in the file, in bytes."""
    length: int
    """Its length in bytes."""
    crc32: int | None
    """Its checksum, or None where the archive was written without checksums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipArchive:
    """The records of one archive that `torch.save` wrote."""

    path: Path
    """The file it is (part of)."""
    pickle: bytes
    """The record `data.pkl`."""
    storages: dict[str, ZipRecord]
    """Storages by key."""

    def locate(self, tensor: TensorRef, *, name: str) -> tuple[int, int | None]:
        """Return where a tensor begins in the file, in bytes, and its checksum if it has one.

        Raises:
            CheckpointError: The storage is missing or too short for the tensor, or the tensor
                repeats it many times over.
        """
        record = self.storages.get(tensor.storage.key)
        item = ITEM_BYTES[tensor.dtype]
        begin, need = tensor.offset * item, tensor.extent * item
        if record is None or record.length < begin + need:
            have = "no storage" if record is None else f"a storage of {record.length} bytes"
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} has {have}",
                expected=f"a storage of at least {begin + need} bytes",
                hint="the file is damaged or was not written whole; copy it again",
            )
        if tensor.numel * item > record.length + _MAX_REPEATED_BYTES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} repeats a storage of "
                f"{record.length} bytes",
                expected="tensors whose elements the file holds",
                hint="save it with .clone(); if it was not expanded, the file is damaged",
            )
        whole = begin == 0 and need == record.length
        return record.offset + begin, record.crc32 if whole else None


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


def read_zip_archive(path: Path, *, start: int = 0, length: int | None = None) -> ZipArchive:
    """Read the directory and the pickle of a `torch.save` archive.

    Args:
        path: The file.
        start: Where the archive begins in it, in bytes.
        length: How many bytes it takes; None: up to the end of the file.

    Raises:
        CheckpointError: It is no such archive, is damaged, or was repacked with compression.
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


def _read_records(path: Path, start: int, archive: zipfile.ZipFile) -> ZipArchive:
    members = archive.infolist()
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise zipfile.BadZipFile(f"{len(pickles)} records data.pkl")
    root = pickles[0].filename.removesuffix("data.pkl")
    # code of scripted modules is compressed; nothing of it is read
    used = tuple(f"{root}{name}" for name in ("data.pkl", "data/", "byteorder"))
    compressed = [
        m.filename
        for m in members
        if m.compress_type != zipfile.ZIP_STORED and m.filename.startswith(used)
    ]
    if compressed:
        raise zipfile.BadZipFile(f"record {compressed[0]} is compressed; torch stores them raw")
    # torch.serialization.set_crc32_options(False) writes zeros for every checksum
    checked = any(member.CRC for member in members)
    order = next((m for m in members if m.filename == f"{root}byteorder"), None)
    if order is not None and _read_record(archive, order, checked=checked).strip() != b"little":
        raise zipfile.BadZipFile("written on a big-endian machine")
    prefix = f"{root}data/"
    storages = {
        member.filename.removeprefix(prefix): ZipRecord(
            offset=start + _data_offset(archive, member),
            length=member.file_size,
            crc32=member.CRC if checked else None,
        )
        for member in members
        if member.filename.startswith(prefix)
    }
    return ZipArchive(
        path=path, pickle=_read_record(archive, pickles[0], checked=checked), storages=storages
    )


def _read_record(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, checked: bool) -> bytes:
    if member.file_size > _MAX_RECORD_BYTES:
        raise zipfile.BadZipFile(f"record {member.filename} of {member.file_size} bytes")
    assert archive.fp is not None
    archive.fp.seek(_data_offset(archive, member))
    data = archive.fp.read(member.file_size)
    if len(data) != member.file_size:
        raise zipfile.BadZipFile(f"record {member.filename} is cut short")
    if checked and zlib.crc32(data) != member.CRC:
        raise zipfile.BadZipFile(f"record {member.filename} has a wrong checksum")
    return data


def _data_offset(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    file = archive.fp
    assert file is not None
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"record {member.filename} has no header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    if file.read(name_length) != member.orig_filename.encode():
        raise zipfile.BadZipFile(f"record {member.filename} has the header of another")
    begin = member.header_offset + _LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)
    if begin + member.file_size > archive.start_dir:
        raise zipfile.BadZipFile(f"record {member.filename} reaches beyond the records")
    return begin
