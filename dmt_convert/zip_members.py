"""Where an uncompressed zip member lies in its file, so that it can be read or mapped in place."""

from __future__ import annotations

import struct
import zipfile

_LOCAL_HEADER_BYTES = 30
_UTF8_NAME = 0x800


def member_offset(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Return where a member's data begins, in bytes: behind its local header.

    Args:
        archive: The open archive.
        member: One of its members, stored without compression.

    Raises:
        zipfile.BadZipFile: The local header is not the member's, or the data does not lie before
            the directory.
    """
    file = archive.fp
    assert file is not None
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"record {member.filename} has no header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    encoding = "utf-8" if member.flag_bits & _UTF8_NAME else "cp437"
    if file.read(name_length) != member.orig_filename.encode(encoding):
        raise zipfile.BadZipFile(f"record {member.filename} has the header of another")
    begin = member.header_offset + _LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)
    if begin + member.file_size > archive.start_dir:
        raise zipfile.BadZipFile(f"record {member.filename} reaches beyond the records")
    return begin
