"""Write `.safetensors` files as streams: one chunk in memory, whatever the tensor's size.

While one chunk is written, the next is read and the last is checked and hashed, so that a
conversion runs at the disk's pace.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmt_convert.bundle.digest import TreeDigest
from dmt_convert.checkpoint import DTYPE_NAMES, ITEM_BYTES, ZEROS, ByteRows
from dmt_convert.errors import CheckpointError

_SAFETENSORS_DTYPES: Final = {ours: theirs for theirs, ours in DTYPE_NAMES.items()}
_EXPONENTS: Final[Mapping[str, tuple[np.dtype[Any], int, int]]] = {
    "fp64": (np.dtype("<u8"), 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "fp32": (np.dtype("<u4"), 0x7FFF_FFFF, 0x7F80_0000),
    "fp16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "bf16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
}
"""Per float dtype: its bits as integers, the mask without the sign, and the bits of Inf."""


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
    """Gives its bytes; chunks are whole elements, valid until the next but one is asked for."""
    origin: str
    """What to call it in errors."""
    crc32: int | None = None
    """Checksum that its bytes must have."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def array_source(name: str, array: np.ndarray) -> TensorSource:
    """Make a source of a float32 array in memory."""
    data = np.ascontiguousarray(array, dtype=np.float32)
    return TensorSource(
        name=name,
        dtype="fp32",
        shape=data.shape,
        chunks=lambda: iter([data.reshape(-1).view(np.uint8)]),
        origin=name,
    )


def write_safetensors(
    path: Path,
    sources: Sequence[TensorSource],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write a file with mode 0644 and bring it to the disk.

    Args:
        path: Where to; must not exist.
        sources: The tensors, in the order of the file.
        metadata: Strings for the header.
        on_bytes: Told of every written piece, for progress.

    Returns:
        Tensor name -> digest.

    Raises:
        CheckpointError: A tensor holds NaN or Inf, or not the bytes that its checksum says.
        OSError: The disk is full, or fails.
    """
    digests = {}
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(2) as pool:
        os.fchmod(file.fileno(), 0o644)
        header = _header(sources, metadata)
        _write_all(file.fileno(), memoryview(header))
        for source in sources:
            digests[source.name] = _write_tensor(file.fileno(), source, pool, on_bytes)
        file.truncate(len(header) + sum(source.nbytes for source in sources))
        os.fsync(file.fileno())
    return digests


def _header(sources: Sequence[TensorSource], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for source in sources:
        entries[source.name] = {
            "dtype": _SAFETENSORS_DTYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, position + source.nbytes],
        }
        position += source.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    descriptor: int,
    source: TensorSource,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> str:
    check = _Check(source)
    chunks = source.chunks()
    written = 0
    ahead: Future[ByteRows | None] = pool.submit(next, chunks, None)
    while (chunk := ahead.result()) is not None:
        ahead = pool.submit(next, chunks, None)
        checking = pool.submit(check.update, chunk, written)
        if chunk is ZEROS:
            os.lseek(descriptor, chunk.nbytes, os.SEEK_CUR)
        else:
            _write_all(descriptor, chunk.data)
        checking.result()
        written += chunk.nbytes
        on_bytes(chunk.nbytes)
    assert written == source.nbytes, (source.name, written, source.nbytes)
    return check.finish()


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]


class _Check:
    """Looks at every chunk once: finite, checksum, digest."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._digest = TreeDigest()
        self._crc32 = 0

    def update(self, chunk: ByteRows, position: int) -> None:
        self._digest.update(chunk)
        if self._source.crc32 is not None:
            self._crc32 = zlib.crc32(chunk.data, self._crc32)
        if chunk is not ZEROS and self._source.dtype in _EXPONENTS:
            bad = first_non_finite(chunk, self._source.dtype)
            if bad is not None:
                self._refuse(position // ITEM_BYTES[self._source.dtype] + bad)

    def finish(self) -> str:
        if self._source.crc32 is not None and self._source.crc32 != self._crc32:
            raise CheckpointError(
                f"{self._source.origin} has the checksum {self._crc32:08x}",
                expected=f"{self._source.crc32:08x}, as the file says: its bytes changed on disk",
                hint="copy the checkpoint again from where it was written",
            )
        return self._digest.finish()

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
    """Return the index of the first NaN or Inf, None where all elements are finite."""
    kind, mask, infinity = _EXPONENTS[dtype]
    bits = chunk.view(kind)
    magnitude = np.bitwise_and(bits, kind.type(mask))
    if int(magnitude.max(initial=0)) < infinity:
        return None
    return int(np.flatnonzero(magnitude >= infinity)[0])
