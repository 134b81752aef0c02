"""Tensors of our own files, which are compared with their digests whenever they are read.

A stream of a whole tensor is compared with its digest as it goes by. A lookup of single rows looks
at the 32 KiB blocks around them, the first time that they are touched. The checksums of the blocks
lie in a file beside the weights. Where there is none (bundles of older versions), or it is damaged,
the first lookup reads the whole tensor.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.arrays import BoolArray, IntArray
from dmt_convert.checkpoint import ByteRows, HeldFile, TensorInfo, stream_bytes
from dmt_convert.errors import DmtError
from dmt_convert.files.digest import BLOCK_BYTES, Checksums, TreeDigest, digest_of_blocks

_BLOCKS_PER_READ: Final = 256
SUFFIX: Final = ".blocks"
"""What the file of the checksums is called: `tower_000.blocks` beside `tower_000.safetensors`."""

Refuse = Callable[[str], DmtError]
"""Makes the error for bytes that changed, from words for what they are."""


class TensorGuard:
    """Compares what is read of one tensor with its digest.

    Args:
        info: The tensor, row-major and in one piece.
        digest: What `TreeDigest` gave when it was written.
        load: Gives the checksums of its blocks, if they are known.
        refuse: Makes the error.
    """

    def __init__(
        self,
        info: TensorInfo,
        digest: str,
        *,
        load: Callable[[], Checksums | None],
        refuse: Refuse,
    ) -> None:
        (piece,) = info.pieces
        self._begin, self._length = piece.offset, info.nbytes
        self._row_bytes = max(1, info.nbytes // max(1, info.shape[0] if info.shape else 1))
        self._name, self._digest = info.name, digest
        self._load, self._refuse = load, refuse
        self._blocks: Checksums | None = None
        self._checked: BoolArray = np.zeros(-(-self._length // BLOCK_BYTES), dtype=bool)
        self._whole = False
        self._lock = threading.Lock()

    def check_ranges(self, file: HeldFile, begins: IntArray, width: int) -> None:
        """Compare the blocks around some ranges that were not compared yet.

        Raises:
            DmtError: One changed since it was written.
        """
        if self._whole or not len(begins) or not width:
            return
        first = (begins - self._begin) // BLOCK_BYTES
        last = (begins - self._begin + width - 1) // BLOCK_BYTES
        with self._lock:
            new = _between(first, last)
            new = new[~self._checked[new]]
            if not len(new):
                return
            blocks = self._known_blocks()
            if blocks is None:
                for _ in self._compare_all(stream_bytes(file, self._begin, self._length)):
                    pass
                return
            self._compare(file, new, blocks)

    def check_stream(
        self, file: HeldFile, offset: int, length: int, chunks: Iterator[ByteRows]
    ) -> Iterator[ByteRows]:
        """Pass on bytes, and compare them: the whole tensor on the way, a part of it before.

        Raises:
            DmtError: They changed since they were written.
        """
        if (offset, length) == (self._begin, self._length):
            yield from self._compare_all(chunks)
        else:
            self.check_ranges(file, np.array([offset]), length)
            yield from chunks

    def _known_blocks(self) -> Checksums | None:
        """Return the checksums of the blocks, if they are those of the digest."""
        if self._blocks is None:
            found = self._load()
            if (
                found is None
                or len(found) != len(self._checked)
                or digest_of_blocks(found, self._length) != self._digest
            ):
                return None
            self._blocks = found
        return self._blocks

    def _compare_all(self, chunks: Iterator[ByteRows]) -> Iterator[ByteRows]:
        digest = TreeDigest()
        for chunk in chunks:
            digest.update(chunk)
            yield chunk
        if digest.finish() != self._digest:
            known = self._known_blocks()
            wrong = [] if known is None else np.flatnonzero(known != digest.blocks).tolist()
            raise self._refuse(self._describe(wrong))
        self._whole = True

    def _compare(self, file: HeldFile, wanted: IntArray, blocks: Checksums) -> None:
        for begin in range(0, len(wanted), _BLOCKS_PER_READ):
            some = wanted[begin : begin + _BLOCKS_PER_READ]
            crc32 = self._read_checksums(file, some)
            wrong = some[crc32 != blocks[some]]
            if len(wrong):
                raise self._refuse(self._describe(wrong.tolist()))
        self._checked[wanted] = True
        self._whole = bool(self._checked.all())

    def _read_checksums(self, file: HeldFile, wanted: IntArray) -> Checksums:
        """Read some blocks, ascending, and return what their checksums are now."""
        buffer = memoryview(bytearray(min(len(wanted) * BLOCK_BYTES, self._length)))
        breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)]
        ranges = [
            (first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._length)) for first, last in runs
        ]
        found = []
        with file.open() as descriptor:
            for begin, end in ranges:
                offset = self._begin + begin
                os.posix_fadvise(descriptor, offset, end - begin, os.POSIX_FADV_WILLNEED)
            for begin, end in ranges:
                run = buffer[: end - begin]
                file.read_into(descriptor, self._begin + begin, run)
                found += [
                    zlib.crc32(run[at : at + BLOCK_BYTES]) for at in range(0, len(run), BLOCK_BYTES)
                ]
        return np.array(found, dtype=np.uint32)

    def _describe(self, wrong: Sequence[int]) -> str:
        if not wrong:
            return self._name
        first = wrong[0] * BLOCK_BYTES // self._row_bytes
        last = (min((wrong[0] + 1) * BLOCK_BYTES, self._length) - 1) // self._row_bytes
        more = f", and {len(wrong) - 1} more blocks" if len(wrong) > 1 else ""
        return f"{self._name} (rows {first} to {last}{more})"


def _between(first: IntArray, last: IntArray) -> IntArray:
    """Numbers from each `first` to its `last`, ascending, once each; both are ascending."""
    if (last - first <= 1).all():
        return np.unique(np.concatenate([first, last]))
    return np.unique(
        np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
    )


def guarded(
    tensors: Mapping[str, TensorInfo],
    digests: Mapping[str, str],
    *,
    error: type[DmtError],
    what: str,
    hint: str,
) -> dict[str, TensorInfo]:
    """Let the tensors of one of our files be compared with their digests when they are read.

    Args:
        tensors: Name -> tensor, all of one `.safetensors` file.
        digests: Name -> its digest.
        error: Kind of error to raise.
        what: What the file belongs to, for errors: `the bundle ckpt-dmt4`.
        hint: What to do about a damaged one.
    """
    in_order = sorted(tensors.values(), key=lambda info: info.pieces[0].offset)
    blocks = _BlockFile(in_order)
    result = {}
    for name, info in tensors.items():
        (piece,) = info.pieces

        def refuse(found: str, file: str = piece.path.name) -> DmtError:
            return error(
                f"{what} changed on disk: {found} in {file} has other bytes than were written",
                expected="the bytes of the digests in its manifest",
                hint=hint,
            )

        guard = TensorGuard(info, digests[name], load=blocks.loader(name), refuse=refuse)
        result[name] = replace(info, pieces=(replace(piece, guard=guard),))
    return result


class _BlockFile:
    """Checksums of the blocks of all tensors in a weights file, one after the other."""

    def __init__(self, in_order: Sequence[TensorInfo]) -> None:
        counts = [-(-info.nbytes // BLOCK_BYTES) for info in in_order]
        ends = np.cumsum(counts).tolist()
        names = [info.name for info in in_order]
        self._slices = {
            name: slice(end - count, end)
            for name, count, end in zip(names, counts, ends, strict=True)
        }
        self._total = ends[-1] if ends else 0
        self._file: HeldFile | None = None
        self._content: Checksums | None = None
        if in_order:
            with contextlib.suppress(OSError, DmtError):
                self._file = HeldFile(in_order[0].pieces[0].path.with_suffix(SUFFIX))

    def loader(self, name: str) -> Callable[[], Checksums | None]:
        """Return what gives the checksums of a tensor; None if the file is missing or damaged."""

        def load() -> Checksums | None:
            content = self._read()
            return None if content is None else content[self._slices[name]]

        return load

    def _read(self) -> Checksums | None:
        file = self._file
        if self._content is None and file is not None and file.identity.size == 4 * self._total:
            content = np.empty(self._total, dtype="<u4")
            with contextlib.suppress(OSError, DmtError), file.open() as descriptor:
                file.read_into(descriptor, 0, content.view(np.uint8).data)
                self._content = content
        return self._content


def write_blocks(weights: Path, blocks: Sequence[Checksums]) -> None:
    """Write the checksums of a weights file's tensors beside it.

    Args:
        weights: The weights file.
        blocks: Of each tensor, in the file's order.
    """
    content = np.concatenate([*blocks, np.empty(0, np.uint32)]).astype("<u4")
    with weights.with_suffix(SUFFIX).open("xb") as file:
        file.write(content.tobytes())
        file.flush()
        os.fsync(file.fileno())
