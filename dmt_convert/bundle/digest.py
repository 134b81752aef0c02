"""Digests of tensors, chunk by chunk, at the pace of a disk.

A tensor's digest is sha256 over the CRC-32 of each of its 8 MiB chunks. CRC-32 is three times as
fast as sha256 here and finds every accident (a flipped bit, a lost block); it is no protection
against someone who forges a file. Holes of sparse files cost nothing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Final

from dmt_convert.checkpoint import CHUNK_BYTES, ZEROS, ByteRows

PREFIX: Final = "crc32/8MiB:"
_POLYNOMIAL: Final = 0xEDB88320


class TreeDigest:
    """Takes bytes in pieces of any size; `finish` gives the digest."""

    def __init__(self) -> None:
        self._outer = hashlib.sha256()
        self._inner = 0
        self._filled = 0

    def update(self, chunk: ByteRows) -> int:
        """Take the next bytes.

        Returns:
            Their CRC-32, which is computed on the way.
        """
        if chunk is ZEROS and self._filled == 0:
            self._inner, self._filled = crc32_of(chunk), CHUNK_BYTES
            return self._close_chunk()
        whole = 0
        view = chunk.data
        while len(view):
            part = view[: CHUNK_BYTES - self._filled]
            crc32 = zlib.crc32(part)
            whole = combine_crc32(whole, crc32, len(part))
            self._inner = combine_crc32(self._inner, crc32, len(part))
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._close_chunk()
        return whole

    def finish(self) -> str:
        """Return the digest of all bytes taken."""
        if self._filled:
            self._close_chunk()
        return PREFIX + self._outer.hexdigest()

    def _close_chunk(self) -> int:
        inner = self._inner
        self._outer.update(inner.to_bytes(4, "little"))
        self._inner = self._filled = 0
        return inner


def crc32_of(chunk: ByteRows) -> int:
    """CRC-32 of a chunk; that of `ZEROS` is computed once."""
    return _crc32_of_zeros() if chunk is ZEROS else zlib.crc32(chunk.data)


@cache
def _crc32_of_zeros() -> int:
    return zlib.crc32(ZEROS.data)


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of two strings of bytes, one after the other, from the CRC-32 of each.

    Args:
        first: Of the first string.
        second: Of the second string.
        length: Of the second string, in bytes.

    Source: the CRC is linear over GF(2); appending `length` zero bytes is a 32 x 32 matrix.
    """
    if first == 0:
        return second
    return _apply(_zeros_operator(length), first) ^ second


@lru_cache(maxsize=64)
def _zeros_operator(length: int) -> tuple[int, ...]:
    """Matrix that takes the CRC of a string to that of the string and `length` zero bytes."""
    one_bit = (_POLYNOMIAL, *(1 << n for n in range(31)))
    square = one_bit
    result = tuple(1 << n for n in range(32))
    bits = length * 8
    while bits:
        if bits & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        bits >>= 1
    return result


def _multiply(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_apply(left, column) for column in right)


def _apply(matrix: tuple[int, ...], vector: int) -> int:
    total, row = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[row]
        vector >>= 1
        row += 1
    return total


def digest_names(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Digest a model: sha256 over the name, dtype, shape and digest of its tensors, by name."""
    outer = hashlib.sha256()
    for name, dtype, shape, digest in sorted(entries):
        outer.update(f"{name}\0{dtype}\0{list(shape)}\0{digest}\n".encode())
    return "sha256:" + outer.hexdigest()
