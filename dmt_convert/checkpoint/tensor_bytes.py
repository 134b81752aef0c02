"""Get at a tensor's bytes: whole, row by row, or as a stream. Memory stays small.

Rows are gathered through short-lived memory maps, so that a lookup in a 100 GB table costs
the pages it touches and no more; streams go through one reused buffer.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, Piece, Segment, TensorInfo
from dmt_convert.checkpoint.inert_objects import TensorRef
from dmt_convert.checkpoint.safe_unpickler import read_pickle
from dmt_convert.checkpoint.zip_archive import read_zip_archive
from dmt_convert.errors import CheckpointError

CHUNK_BYTES: Final = 8 << 20
"""Size of the buffers through which tensors stream, in bytes."""
ZEROS: Final = np.zeros(CHUNK_BYTES, dtype=np.uint8)
"""A chunk of zeros; stands for a hole of a sparse file."""
_ROWS_PER_MAP: Final = 2048
"""Rows gathered per memory map: the kernel maps 64 KiB around every touched page, and a map's
pages count as resident until it is closed, so one map costs at most 128 MiB."""

ByteRows = npt.NDArray[np.uint8]
NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "fp64": np.dtype("<f8"),
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}


def resolve_segments(info: TensorInfo) -> tuple[Segment, ...]:
    """Return where the tensor's elements lie, looking into `torch.save` pieces.

    A derived tensor lies nowhere: its sources do.

    Raises:
        CheckpointError: A piece is damaged, or is not the tensor that the header promised.
    """
    return tuple(_resolve(piece, info.dtype, info.path) for piece in info.pieces)


@lru_cache(maxsize=65536)
def _resolve(piece: Piece, dtype: str, name: str) -> Segment:
    if piece.encoding == "raw":
        return Segment(
            path=piece.path,
            offset=piece.offset,
            starts=piece.starts,
            sizes=piece.sizes,
            crc32=piece.crc32,
            strides=piece.strides,
        )
    archive = read_zip_archive(piece.path, start=piece.offset, length=piece.length)
    tensor = read_pickle(io.BytesIO(archive.pickle), source=piece.path)
    if not isinstance(tensor, TensorRef) or (tensor.dtype, tensor.shape) != (dtype, piece.sizes):
        found = (
            f"{tensor.dtype} of shape {list(tensor.shape)}"
            if isinstance(tensor, TensorRef)
            else type(tensor).__name__
        )
        raise CheckpointError(
            f"{piece.path}: the payload of {name} at byte {piece.offset} is {found}",
            expected=f"{dtype} of shape {list(piece.sizes)}, as .metadata says",
            hint="files of two saves are mixed; copy the directory again",
        )
    offset, crc32 = archive.locate(tensor, name=name)
    return Segment(
        path=piece.path,
        offset=offset,
        starts=piece.starts,
        sizes=piece.sizes,
        crc32=crc32 if tensor.is_contiguous else None,
        strides=None if tensor.is_contiguous else tensor.strides,
    )


def gather_rows(info: TensorInfo, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Read some rows of a table as fp32.

    Args:
        info: A tensor of shape (rows, N), or (rows,), in fp32, fp16, bf16 or fp64.
        rows: Row indices, shape (n,), each within the table; sorted indices read fastest.

    Returns:
        The rows, shape (n, N), float32; N is 1 for a vector.
    """
    return to_fp32(gather_bytes(info, rows), info.dtype)


def gather_bytes(info: TensorInfo, rows: npt.NDArray[np.int64]) -> ByteRows:
    """Read some rows of a tensor of any rank and dtype as they are stored.

    Args:
        info: The tensor; what its first axis counts are its rows.
        rows: Row indices, shape (n,), each within the tensor; sorted indices read fastest.

    Returns:
        Their bytes, shape (n, bytes per row).
    """
    if info.derivation is not None:
        return info.derivation.gather(rows)
    segments = [_as_matrix(segment, info) for segment in resolve_segments(info)]
    if None in segments:  # blocks of a tensor of three axes or more, which is no table
        return _read_bytes(info).reshape(info.shape[0], -1)[rows]
    item = ITEM_BYTES[info.dtype]
    out = np.empty((len(rows), _count(info.shape[1:]) * item), dtype=np.uint8)
    for segment in segments:
        assert segment is not None
        _gather_segment(segment, item, rows, out)
    return out


def _as_matrix(segment: Segment, info: TensorInfo) -> Segment | None:
    """Describe a block by its rows alone, as of a table; None where that cannot be done."""
    if len(segment.sizes) == 2:
        return segment
    inner = _count(segment.sizes[1:])
    strides = segment.strides
    if len(segment.sizes) > 1 and (strides is not None or segment.sizes[1:] != info.shape[1:]):
        return None
    return replace(
        segment,
        starts=(*segment.starts[:1], 0) if segment.starts else (0, 0),
        sizes=(*segment.sizes[:1], inner) if segment.sizes else (1, 1),
        strides=None if not strides else (*strides, 1),
    )


def _gather_segment(
    segment: Segment, item: int, rows: npt.NDArray[np.int64], out: ByteRows
) -> None:
    (row, col), (num_rows, num_cols) = segment.starts, segment.sizes
    picked = np.flatnonzero((rows >= row) & (rows < row + num_rows))
    if num_cols == 0:
        return
    for begin in range(0, len(picked), _ROWS_PER_MAP):
        chosen = picked[begin : begin + _ROWS_PER_MAP]
        with _MappedBlock(segment, item) as block:
            out[chosen, col * item : (col + num_cols) * item] = block.rows(rows[chosen] - row)


class _MappedBlock:
    """A 2-D block of bytes over a memory map, closed on exit."""

    def __init__(self, segment: Segment, item: int) -> None:
        self._segment, self._item = segment, item
        strides = segment.strides or (segment.sizes[1], 1)
        self._strides = (strides[0] * item, strides[1] * item)

    def __enter__(self) -> _MappedBlock:
        segment, item = self._segment, self._item
        shape = (segment.sizes[0], segment.sizes[1], item)
        extent = sum((n - 1) * s for n, s in zip(shape[:2], self._strides, strict=True)) + item
        first = segment.offset - segment.offset % mmap.ALLOCATIONGRANULARITY
        with segment.path.open("rb") as file:
            self._map = mmap.mmap(
                file.fileno(),
                segment.offset - first + extent,
                access=mmap.ACCESS_READ,
                offset=first,
            )
        flat = np.frombuffer(self._map, dtype=np.uint8, offset=segment.offset - first)
        self._block: ByteRows | None = np.lib.stride_tricks.as_strided(
            flat, shape=shape, strides=(*self._strides, 1), writeable=False
        )
        return self

    def rows(self, index: npt.NDArray[np.int64]) -> ByteRows:
        assert self._block is not None
        self._read_ahead(index)
        picked: ByteRows = self._block[index]
        return picked.reshape(len(index), -1)

    def _read_ahead(self, index: npt.NDArray[np.int64]) -> None:
        """Ask for all pages at once: a disk serves many requests faster than one by one."""
        index, size = np.sort(index), mmap.PAGESIZE
        shift = self._segment.offset % mmap.ALLOCATIONGRANULARITY
        first = (shift + index * self._strides[0]) // size
        last = (shift + (index + 1) * self._strides[0] - 1) // size
        breaks = np.flatnonzero(first[1:] > last[:-1] + 1)
        begins = first[np.concatenate([[0], breaks + 1])]
        ends = last[np.concatenate([breaks, [len(index) - 1]])]
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            length = min((end + 1) * size, len(self._map)) - begin * size
            self._map.madvise(mmap.MADV_WILLNEED, begin * size, length)

    def __exit__(self, *_: object) -> None:
        self._block = None
        self._map.close()


def read_tensor(info: TensorInfo) -> npt.NDArray[np.generic]:
    """Read a whole tensor; bf16 comes as fp32, all other dtypes as they are.

    For tensors that fit in memory (the dense parts); tables are streamed or gathered.
    """
    raw = _read_bytes(info)
    if info.dtype == "bf16":
        return to_fp32(raw.reshape(1, -1), "bf16").reshape(info.shape)
    return raw.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def check_finite(array: npt.NDArray[np.generic], origin: str) -> None:
    """Refuse an array that holds NaN or Inf.

    Args:
        array: Numbers.
        origin: What the checkpoint calls them.

    Raises:
        CheckpointError: It does.
    """
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise CheckpointError(
            f"{origin} holds NaN or Inf ({bad} of {array.size} elements)",
            expected="finite weights",
            hint="the training diverged or the file is damaged; use another checkpoint",
        )


def _read_bytes(info: TensorInfo) -> ByteRows:
    """Read a whole tensor's bytes, row-major, shape (bytes,)."""
    if len(info.shape) != 2 and len(info.pieces) > 1:
        return _read_sharded_vector(info)
    raw = np.concatenate([*_chunks(info)]) if info.nbytes else np.empty(0, np.uint8)
    assert raw.nbytes == info.nbytes
    return raw


def _read_sharded_vector(info: TensorInfo) -> ByteRows:
    """Read a tensor of any rank that was saved in several blocks."""
    item = ITEM_BYTES[info.dtype]
    out = np.empty((*info.shape, item), dtype=np.uint8)
    for segment in resolve_segments(info):
        block = np.concatenate([*_segment_chunks(segment, item)] or [np.empty(0, np.uint8)])
        where = tuple(slice(a, a + n) for a, n in zip(segment.starts, segment.sizes, strict=True))
        out[where] = block.reshape(*segment.sizes, item)
    return out.reshape(-1)


def _chunks(info: TensorInfo) -> Iterator[ByteRows]:
    for chunk in stream_tensor(info):
        yield chunk.copy()


def _segment_chunks(segment: Segment, item: int) -> Iterator[ByteRows]:
    if segment.strides is not None:
        yield from _strided_chunks(segment, item)
        return
    count = item
    for size in segment.sizes:
        count *= size
    for chunk in stream_file(segment.path, segment.offset, count):
        yield chunk.copy()


def stream_tensor(info: TensorInfo) -> Iterator[ByteRows]:
    """Yield a tensor's bytes in row-major order through a few reused buffers.

    Every chunk is a whole number of elements, valid until the next but one is asked for.
    """
    if info.derivation is not None:
        yield from _stream_rows(info)
        return
    segments = sorted(resolve_segments(info), key=lambda segment: segment.starts)
    segments = [s for s in segments if all(size > 0 for size in s.sizes)]
    item = ITEM_BYTES[info.dtype]
    if not segments:
        return
    full_width = all(s.sizes[1:] == info.shape[1:] for s in segments)
    strided_table = len(info.shape) == 2 and any(s.strides is not None for s in segments)
    if full_width and not strided_table:
        for segment in segments:
            if segment.strides is not None:
                yield from _strided_chunks(segment, item)
            else:
                length = info.nbytes if not info.shape else item * _count(segment.sizes)
                yield from stream_file(segment.path, segment.offset, length)
    else:
        yield from _stream_rows(info)


def stream_file(path: Path, offset: int, length: int) -> Iterator[ByteRows]:
    """Yield `length` bytes of a file through a few reused buffers.

    A chunk is valid until the next but one is asked for, so that reading ahead is safe. Where
    the file has a hole of a whole chunk, `ZEROS` itself (or its beginning) is yielded.

    Raises:
        CheckpointError: The file ends before.
    """
    buffers = [bytearray(min(CHUNK_BYTES, length)) for _ in range(3)]
    with path.open("rb", buffering=0) as file:
        done = 0
        for turn in range(-(-length // CHUNK_BYTES)):
            want = min(CHUNK_BYTES, length - done)
            if want == CHUNK_BYTES and _is_hole(file.fileno(), offset + done, want):
                yield ZEROS
            else:
                view = memoryview(buffers[turn % 3])[:want]
                _fill(file, offset + done, view, path)
                yield np.frombuffer(view, dtype=np.uint8)
            done += want


def _fill(file: io.FileIO, offset: int, view: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(view):
        count = os.preadv(file.fileno(), [view[filled:]], offset + filled)
        if not count:
            raise CheckpointError(
                f"{path} ends {len(view) - filled} bytes early",
                expected=f"{len(view)} bytes from byte {offset} on",
                hint="the file changed while it was read, or was cut short",
            )
        filled += count


def _is_hole(descriptor: int, offset: int, length: int) -> bool:
    """Tell whether a range of a sparse file was never written."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        # ENXIO: no data behind offset, if offset is within the file at all
        size = os.fstat(descriptor).st_size
        return error.errno == errno.ENXIO and size >= offset + length


def _strided_chunks(segment: Segment, item: int) -> Iterator[ByteRows]:
    """Yield a block that was saved as a transposed or sliced view, row-major."""
    assert segment.strides is not None
    extent = item + sum(
        (n - 1) * s * item for n, s in zip(segment.sizes, segment.strides, strict=True)
    )
    with segment.path.open("rb") as file:
        file.seek(segment.offset)
        raw = np.frombuffer(file.read(extent), dtype=np.uint8)
    if raw.nbytes != extent:
        raise CheckpointError(
            f"{segment.path} ends {extent - raw.nbytes} bytes early",
            expected=f"{extent} bytes from byte {segment.offset} on",
            hint="the file was cut short; copy it again",
        )
    strides = (*(s * item for s in segment.strides), 1)
    block = np.lib.stride_tricks.as_strided(raw, (*segment.sizes, item), strides, writeable=False)
    yield np.ascontiguousarray(block).reshape(-1)


def _stream_rows(info: TensorInfo) -> Iterator[ByteRows]:
    """Stream what lies in no file row by row (sharded columns, a derived tensor)."""
    if info.derivation is None and len(info.shape) != 2:  # no table, and small
        yield _read_bytes(info)
        return
    rows = info.shape[0] if info.shape else 1
    step = max(1, min(_ROWS_PER_MAP * 8, CHUNK_BYTES * rows // max(1, info.nbytes)))
    for begin in range(0, rows if info.nbytes else 0, step):
        index = np.arange(begin, min(begin + step, rows), dtype=np.int64)
        yield gather_bytes(info, index).reshape(-1)


def to_fp32(raw: ByteRows, dtype: str) -> npt.NDArray[np.float32]:
    """Read the bytes of (n, N) elements of a float dtype as float32, shape (n, N)."""
    if dtype == "bf16":
        wide = raw.view(np.dtype("<u2")).astype(np.uint32) << 16
        return wide.view(np.float32)
    return raw.view(NUMPY_DTYPES[dtype]).astype(np.float32, copy=False)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
