"""Digests and checksums of tensors, chunk by chunk, at the pace of a disk.

A tensor's digest is ours: sha256 over the CRC-32 of each of its 8 MiB chunks. CRC-32 is three times
as fast as sha256 here and finds every accident (a flipped bit, a lost block); it is no protection
against someone who forges a file. Holes of sparse files cost nothing. The CRC-32 of a chunk follows
from those of its 32 KiB blocks, so that a list of these, which `block_checks` keeps beside a table,
is itself checked by the digest. A checksum is the container's own CRC-32 of a block; what is read
of a checkpoint is compared with it.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import (
    CHUNK_BYTES,
    ITEM_BYTES,
    ZEROS,
    ByteRows,
    Piece,
    TensorInfo,
    resolve_pieces,
    stream_piece,
    stream_tensor,
)
from dmt_convert.errors import CheckpointError

PREFIX: Final = "crc32/8MiB:"


BLOCK_BYTES: Final = 32 << 10
"""Bytes of a block; what is read to check one row."""
_BLOCKS_PER_CHUNK: Final = CHUNK_BYTES // BLOCK_BYTES

Checksums = npt.NDArray[np.uint32]
"""CRC-32 of consecutive blocks."""


class TreeDigest:
    """Takes bytes in pieces of any size; `finish` gives the digest, `blocks` the checksums."""

    def __init__(self) -> None:
        self._outer = hashlib.sha256()
        self._chunk, self._blocks_in_chunk = 0, 0
        self._block, self._filled = 0, 0
        self._closed = array("I")

    def update(self, chunk: ByteRows) -> None:
        """Take the next bytes."""
        if chunk is ZEROS and not self._filled and not self._blocks_in_chunk:
            whole, block = _crc32_of_zeros()
            self._closed.extend([block] * _BLOCKS_PER_CHUNK)
            self._outer.update(whole.to_bytes(4, "little"))
            return
        view = chunk.data.cast("B") if chunk.nbytes else memoryview(b"")
        while len(view):
            part = view[: BLOCK_BYTES - self._filled]
            self._block = zlib.crc32(part, self._block)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._close_block()

    def finish(self) -> str:
        """Return the digest of all bytes taken."""
        if self._filled:
            self._close_block()
        if self._blocks_in_chunk:
            self._close_chunk()
        return PREFIX + self._outer.hexdigest()

    @property
    def blocks(self) -> Checksums:
        """CRC-32 of every 32 KiB; complete once the digest is finished."""
        return np.array(self._closed, dtype=np.uint32)

    def _close_block(self) -> None:
        self._closed.append(self._block)
        self._chunk = _combine(self._chunk, self._block, self._filled)
        self._block = self._filled = 0
        self._blocks_in_chunk += 1
        if self._blocks_in_chunk == _BLOCKS_PER_CHUNK:
            self._close_chunk()

    def _close_chunk(self) -> None:
        self._outer.update(self._chunk.to_bytes(4, "little"))
        self._chunk = self._blocks_in_chunk = 0


def digest_of_blocks(blocks: Checksums, nbytes: int) -> str:
    """Return the digest of a tensor by the checksums of its blocks.

    Args:
        blocks: CRC-32 of every 32 KiB of the tensor, and of what is left.
        nbytes: Bytes of the tensor.
    """
    whole = nbytes // CHUNK_BYTES * _BLOCKS_PER_CHUNK
    table = _block_shift()
    chunks = np.zeros(whole // _BLOCKS_PER_CHUNK, dtype=np.uint32)
    for column in blocks[:whole].reshape(-1, _BLOCKS_PER_CHUNK).T:
        shifted = table[0][chunks & 255]
        for byte in (1, 2, 3):
            shifted ^= table[byte][chunks >> (8 * byte) & 255]
        chunks = shifted ^ column
    outer = hashlib.sha256(chunks.astype("<u4").tobytes())
    rest, last = blocks[whole:].tolist(), nbytes % BLOCK_BYTES or BLOCK_BYTES
    if rest:
        chunk = 0
        for block in rest[:-1]:
            chunk = _combine(chunk, block, BLOCK_BYTES)
        outer.update(_combine(chunk, rest[-1], last).to_bytes(4, "little"))
    return PREFIX + outer.hexdigest()


def _combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two byte strings together; `length` is that of the second."""
    if length == BLOCK_BYTES:
        a, b, c, d = _shift_lists()
        shifted = a[first & 255] ^ b[first >> 8 & 255] ^ c[first >> 16 & 255] ^ d[first >> 24]
        return shifted ^ second
    zeros = ZEROS.data[:length]
    return zlib.crc32(zeros, first) ^ zlib.crc32(zeros) ^ second


@cache
def _block_shift() -> npt.NDArray[np.uint32]:
    """What a block of zeros makes of a CRC-32, by each of its bytes: shape (4, 256).

    CRC-32 is linear: crc(A + B) = shift(crc(A)) ^ crc(B), where the shift goes by the length of B
    only, and the shift of a number is that of its bits together.
    """
    zeros = ZEROS.data[:BLOCK_BYTES]
    nothing = zlib.crc32(zeros)
    bits = [zlib.crc32(zeros, 1 << bit) ^ nothing for bit in range(32)]
    table = np.zeros((4, 256), dtype=np.uint32)
    for byte in range(4):
        for bit in range(8):
            with_bit = np.arange(256) >> bit & 1 == 1
            table[byte, with_bit] ^= np.uint32(bits[8 * byte + bit])
    return table


@cache
def _shift_lists() -> list[list[int]]:
    """The same as lists: a look-up of one number in an array is slow."""
    lists: list[list[int]] = _block_shift().tolist()
    return lists


@cache
def _crc32_of_zeros() -> tuple[int, int]:
    """CRC-32 of a chunk of zeros, and of a block."""
    return zlib.crc32(ZEROS.data), zlib.crc32(ZEROS.data[:BLOCK_BYTES])


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
    for chunk in stream_piece(piece, item):
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
