"""Write `.safetensors` files as streams: one chunk in memory, whatever the tensor's size.

One thread reads, one looks at every byte, one writes, so that a conversion runs at the disk's
pace.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import AnyArray
from dmt_convert.checkpoint import (
    DTYPE_NAMES,
    ITEM_BYTES,
    ZEROS,
    ByteRows,
    TensorInfo,
    find_outlier_in_bytes,
    outlier_error,
)
from dmt_convert.errors import CheckpointError
from dmt_convert.files.aligned_writer import ALIGNMENT, AlignedWriter
from dmt_convert.files.block_checks import write_blocks
from dmt_convert.files.digest import Checksums, TreeDigest

_SAFETENSORS_DTYPES: Final = {ours: theirs for theirs, ours in DTYPE_NAMES.items()}
_LATE_HEADER_BYTES: Final = 16_384
_INFINITIES: Final[Mapping[str, tuple[np.dtype[Any], np.dtype[Any], int]]] = {
    "fp64": (np.dtype("<i8"), np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "fp32": (np.dtype("<i4"), np.dtype("<u4"), 0x7F80_0000),
    "fp16": (np.dtype("<i2"), np.dtype("<u2"), 0x7C00),
    "bf16": (np.dtype("<i2"), np.dtype("<u2"), 0x7F80),
}
"""Per float dtype: its bits as signed and unsigned integers, and the bits of Inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor to be written."""

    name: str
    """Name in the file."""
    dtype: str
    """A key of `checkpoint.ITEM_BYTES`."""
    shape: tuple[int, ...]
    """Its shape."""
    chunks: Callable[[], Iterator[ByteRows]]
    """Yields its bytes; chunks are whole elements, valid until the next but one is requested."""
    origin: str
    """What to call it in errors."""
    is_weight: bool = False
    """Whether values that are absurd as weights are refused."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def array_source(name: str, array: AnyArray) -> TensorSource:
    """Make a source of a float32 array in memory."""
    data = np.asarray(array, dtype=np.float32, order="C")  # a scalar stays one
    return TensorSource(
        name=name,
        dtype="fp32",
        shape=data.shape,
        chunks=lambda: iter([data.reshape(-1).view(np.uint8)]),
        origin=name,
    )


class StreamedFile:
    """A file whose large tensors are written first; small ones and the header follow.

    So tables stream to the disk while the small tensors beside them are still being computed.

    Args:
        path: The file; must not exist.
        sources: The large tensors, first in the file.
        metadata: Strings for the header.
    """

    def __init__(
        self, path: Path, sources: Sequence[TensorSource], *, metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._metadata = metadata
        self._written: list[TensorSource] = []
        self._digests: dict[str, str] = {}
        self._blocks: list[Checksums] = []
        self._sources = sources
        # room for the header: what is known now, and the few tensors of a tower module
        self._begin = _align(8 + len(_header_text(sources, metadata)) + _LATE_HEADER_BYTES)

    def write_large(self, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Stream the large tensors.

        Raises:
            CheckpointError: A tensor holds NaN or Inf, or not the bytes that its checksum says.
            OSError: The disk is full, or fails.
        """
        with (
            AlignedWriter(self._path, self._begin) as writer,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as checker,
        ):
            for source in self._sources:
                self._stream(source, writer, reader, checker, on_bytes)

    def finish(
        self, late: Sequence[TensorSource] = (), *, with_blocks: bool = False
    ) -> dict[str, str]:
        """Append the small tensors, write the header, bring the file to the disk.

        Args:
            late: The small tensors.
            with_blocks: Also write the file by which single rows can be checked.

        Returns:
            Tensor name -> digest.

        Raises:
            CheckpointError: A tensor holds NaN or Inf.
            OSError: The disk is full, or fails.
        """
        if not self._written:  # then the header may take what it needs
            self._begin = _align(8 + len(_header_text(late, self._metadata)))
        with self._path.open("r+b", buffering=0) as file:
            file.truncate(self._begin + _total(self._written))
            file.seek(0, os.SEEK_END)
            for source in late:
                check = _Check(source)
                for chunk in source.chunks():
                    check.update(chunk)
                    _write_all(file.fileno(), chunk.data)
                self._done(source, check)
            text = _header_text(self._written, self._metadata)
            assert 8 + len(text) <= self._begin, "the header outgrew its room"
            text += b" " * (self._begin - 8 - len(text))
            file.seek(0)
            _write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
            os.fsync(file.fileno())
        if with_blocks:
            write_blocks(self._path, self._blocks)
        return self._digests

    def _stream(
        self,
        source: TensorSource,
        writer: AlignedWriter,
        reader: ThreadPoolExecutor,
        checker: ThreadPoolExecutor,
        on_bytes: Callable[[int], None],
    ) -> None:
        """While one chunk is written, the next is read and the same one is looked at."""
        check = _Check(source)
        chunks = source.chunks()
        ahead: Future[ByteRows | None] = reader.submit(next, chunks, None)
        while (chunk := ahead.result()) is not None:
            ahead = reader.submit(next, chunks, None)
            checking = checker.submit(check.update, chunk)
            writer.write(chunk)
            checking.result()
            on_bytes(chunk.nbytes)
        self._done(source, check)

    def _done(self, source: TensorSource, check: _Check) -> None:
        assert check.seen == source.nbytes, (source.name, check.seen, source.nbytes)
        self._digests[source.name] = check.digest.finish()
        self._blocks.append(check.digest.blocks)
        self._written.append(source)


def write_safetensors(
    path: Path, sources: Sequence[TensorSource], *, metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write a whole file at once; see `StreamedFile`."""
    file = StreamedFile(path, sources, metadata=metadata)
    file.write_large()
    return file.finish()


def safetensors_header(
    tensors: Sequence[TensorSource | TensorInfo], metadata: Mapping[str, str]
) -> bytes:
    """Return the beginning of a file: all before its first tensor, which begins aligned.

    Args:
        tensors: Its tensors, in their order.
        metadata: Strings for the header.
    """
    text = _header_text(tensors, metadata)
    text += b" " * (_align(8 + len(text)) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _header_text(
    sources: Sequence[TensorSource | TensorInfo], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for source in sources:
        entries[source.name] = {
            "dtype": _SAFETENSORS_DTYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, position + source.nbytes],
        }
        position += source.nbytes
    return json.dumps(entries, separators=(",", ":")).encode()


def _total(sources: Sequence[TensorSource]) -> int:
    return sum(source.nbytes for source in sources)


def _align(length: int) -> int:
    """Round up, so that the first tensor begins aligned."""
    return length + -length % ALIGNMENT


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]


class _Check:
    """Looks at every chunk once: finite, of one scale, digest."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.digest = TreeDigest()
        self.seen = 0

    def update(self, chunk: ByteRows) -> None:
        """Take the next bytes of the tensor."""
        self.digest.update(chunk)
        bad = None if chunk is ZEROS else first_non_finite(chunk, self._source.dtype)
        source, first = self._source, self.seen // ITEM_BYTES[self._source.dtype]
        if bad is not None:
            self._refuse(first + bad)
        if source.is_weight and chunk is not ZEROS:
            outlier = find_outlier_in_bytes(chunk, source.dtype)
            if outlier is not None:
                raise outlier_error(source.origin, outlier, source.shape, first=first)
        self.seen += chunk.nbytes

    def _refuse(self, element: int) -> None:
        shape = self._source.shape
        where = ", ".join(str(i) for i in np.unravel_index(element, shape)) if shape else "0"
        raise CheckpointError(
            f"{self._source.origin} holds NaN or Inf (first at [{where}])",
            expected="finite weights",
            hint="the training diverged, the file is damaged, or --dtype fp16 overflowed "
            "(bf16 has the range of fp32)",
        )


def first_non_finite(chunk: ByteRows, dtype: str) -> int | None:
    """Return the index of the first NaN or Inf, None if all elements are finite.

    As integers, NaN and Inf are the largest values: above Inf's bits among the positive ones
    (signed), above those of -Inf among the negative ones (unsigned).
    """
    if dtype not in _INFINITIES:
        return None
    signed, unsigned, infinity = _INFINITIES[dtype]
    negative = infinity | (1 << (8 * signed.itemsize - 1))
    positive_bits, bits = chunk.view(signed), chunk.view(unsigned)
    if not bits.size or (int(positive_bits.max()) < infinity and int(bits.max()) < negative):
        return None
    return int(np.flatnonzero((positive_bits >= infinity) | (bits >= negative))[0])
