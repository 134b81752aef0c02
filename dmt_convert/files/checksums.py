"""Compare what is read of a checkpoint with the checksums that its container stores."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from dmt_convert.checkpoint import (
    ITEM_BYTES,
    ByteRows,
    Segment,
    TensorInfo,
    resolve_segments,
    stream_file,
    stream_tensor,
)
from dmt_convert.errors import CheckpointError


def check_checksums(info: TensorInfo, origin: str) -> None:
    """Read a tensor, and compare every block of it that has a checksum.

    Args:
        info: The tensor.
        origin: What to call it in errors.

    Raises:
        CheckpointError: Bytes changed since the checkpoint was written.
    """
    for source in () if info.derivation is None else info.derivation.sources:
        check_checksums(source, f"{source.path}, of which {origin} is made,")
    for segment in resolve_segments(info):
        if segment.crc32 is not None:
            for _ in _read_checked(segment, ITEM_BYTES[info.dtype], origin):
                pass


def stream_checked(info: TensorInfo, origin: str) -> Iterator[ByteRows]:
    """Yield a tensor's bytes as `stream_tensor` does, and compare checksums on the way.

    Args:
        info: The tensor.
        origin: What to call it in errors.

    Raises:
        CheckpointError: Bytes changed since the checkpoint was written.
    """
    segments = sorted(resolve_segments(info), key=lambda segment: segment.starts)
    in_files = info.derivation is None
    if in_files and all(s.strides is None and s.sizes[1:] == info.shape[1:] for s in segments):
        for segment in segments:
            yield from _read_checked(segment, ITEM_BYTES[info.dtype], origin)
    else:
        # columns of several blocks interleave, and a derived tensor's bytes lie in no file, so that
        # no block passes by in one piece
        check_checksums(info, origin)
        yield from stream_tensor(info)


def _read_checked(segment: Segment, item: int, origin: str) -> Iterator[ByteRows]:
    length = item
    for size in segment.sizes:
        length *= size
    crc32 = 0
    for chunk in stream_file(segment.path, segment.offset, length):
        if segment.crc32 is not None:
            crc32 = zlib.crc32(chunk.data, crc32)
        yield chunk
    if segment.crc32 is not None and crc32 != segment.crc32:
        raise checksum_error(f"{origin} in {segment.path.name}", crc32, segment.crc32)


def checksum_error(origin: str, found: int, expected: int) -> CheckpointError:
    """Say that bytes are not what their checksum says."""
    return CheckpointError(
        f"{origin} has the checksum {found:08x}",
        expected=f"{expected:08x}, as the file says: its bytes changed on disk",
        hint="copy the checkpoint again from where it was written",
    )
