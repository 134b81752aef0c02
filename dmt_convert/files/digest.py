"""Digests and checksums of tensors, chunk by chunk, at the pace of a disk.

A tensor's digest is ours: sha256 over the CRC-32 of each of its 8 MiB chunks. CRC-32 is three times
as fast as sha256 here and finds every accident (a flipped bit, a lost block); it is no protection
against someone who forges a file. Holes of sparse files cost nothing. A checksum is the container's
own CRC-32 of a block; what is read of a checkpoint is compared with it.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

from dmt_convert.checkpoint import (
    CHUNK_BYTES,
    ITEM_BYTES,
    ZEROS,
    ByteRows,
    Piece,
    TensorInfo,
    resolve_pieces,
    stream_file,
    stream_tensor,
)
from dmt_convert.errors import CheckpointError

PREFIX: Final = "crc32/8MiB:"


class TreeDigest:
    """Takes bytes in pieces of any size; `finish` gives the digest."""

    def __init__(self) -> None:
        self._outer = hashlib.sha256()
        self._inner = 0
        self._filled = 0

    def update(self, chunk: ByteRows) -> None:
        """Take the next bytes."""
        if chunk is ZEROS and self._filled == 0:
            self._inner, self._filled = _crc32_of_zeros(), CHUNK_BYTES
            self._close_chunk()
            return
        view = chunk.data
        while len(view):
            part = view[: CHUNK_BYTES - self._filled]
            self._inner = zlib.crc32(part, self._inner)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._close_chunk()

    def finish(self) -> str:
        """Return the digest of all bytes taken."""
        if self._filled:
            self._close_chunk()
        return PREFIX + self._outer.hexdigest()

    def _close_chunk(self) -> None:
        self._outer.update(self._inner.to_bytes(4, "little"))
        self._inner = self._filled = 0


@cache
def _crc32_of_zeros() -> int:
    return zlib.crc32(ZEROS.data)


def digest_of(tensor: TensorInfo, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Read a tensor and return its digest.

    Args:
        tensor: Where it lies.
        on_bytes: Told of every piece that was read, for progress.
    """
    digest = TreeDigest()
    for chunk in stream_tensor(tensor):
        digest.update(chunk)
        on_bytes(chunk.nbytes)
    return digest.finish()


def digest_names(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Digest a model: sha256 over the name, dtype, shape and digest of its tensors, by name."""
    outer = hashlib.sha256()
    for name, dtype, shape, digest in sorted(entries):
        outer.update(f"{name}\0{dtype}\0{list(shape)}\0{digest}\n".encode())
    return "sha256:" + outer.hexdigest()


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
    for piece in resolve_pieces(info):
        if piece.crc32 is not None:
            for _ in _read_checked(piece, ITEM_BYTES[info.dtype], origin):
                pass


def stream_checked(info: TensorInfo, origin: str) -> Iterator[ByteRows]:
    """Yield a tensor's bytes as `stream_tensor` does, and compare checksums on the way.

    Args:
        info: The tensor.
        origin: What to call it in errors.

    Raises:
        CheckpointError: Bytes changed since the checkpoint was written.
    """
    pieces = sorted(resolve_pieces(info), key=lambda piece: piece.starts)
    in_files = info.derivation is None
    if in_files and all(s.strides is None and s.sizes[1:] == info.shape[1:] for s in pieces):
        for piece in pieces:
            yield from _read_checked(piece, ITEM_BYTES[info.dtype], origin)
    else:
        # columns of several blocks interleave, and a derived tensor's bytes lie in no file, so that
        # no block passes by in one piece
        check_checksums(info, origin)
        yield from stream_tensor(info)


def _read_checked(piece: Piece, item: int, origin: str) -> Iterator[ByteRows]:
    crc32 = 0
    for chunk in stream_file(piece.path, piece.offset, item * math.prod(piece.sizes)):
        if piece.crc32 is not None:
            crc32 = zlib.crc32(chunk.data, crc32)
        yield chunk
    if piece.crc32 is not None and crc32 != piece.crc32:
        raise checksum_error(f"{origin} in {piece.path.name}", crc32, piece.crc32)


def checksum_error(origin: str, found: int, expected: int) -> CheckpointError:
    """Say that bytes are not what their checksum says."""
    return CheckpointError(
        f"{origin} has the checksum {found:08x}",
        expected=f"{expected:08x}, as the file says: its bytes changed on disk",
        hint="copy the checkpoint again from where it was written",
    )
