"""Digests of tensors, chunk by chunk.

A tensor's digest is sha256 over the sha256 of each of its 8 MiB chunks, so that chunks can be
hashed while others are read and written, and the holes of sparse files cost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

from dmt_convert.checkpoint import CHUNK_BYTES, ZEROS, ByteRows

PREFIX = "sha256/8MiB:"


class TreeDigest:
    """Takes bytes in pieces of any size; `finish` gives the digest."""

    def __init__(self) -> None:
        self._outer = hashlib.sha256()
        self._inner = hashlib.sha256()
        self._filled = 0

    def update(self, chunk: ByteRows) -> None:
        """Take the next bytes."""
        if chunk is ZEROS and self._filled == 0:
            self._outer.update(_zeros_digest())
            return
        view = chunk.data
        while len(view):
            part = view[: CHUNK_BYTES - self._filled]
            self._inner.update(part)
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
        self._outer.update(self._inner.digest())
        self._inner = hashlib.sha256()
        self._filled = 0


@cache
def _zeros_digest() -> bytes:
    return hashlib.sha256(ZEROS.data).digest()


def digest_names(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Digest a model: sha256 over the name, dtype, shape and digest of its tensors, by name."""
    outer = hashlib.sha256()
    for name, dtype, shape, digest in sorted(entries):
        outer.update(f"{name}\0{dtype}\0{list(shape)}\0{digest}\n".encode())
    return "sha256:" + outer.hexdigest()
