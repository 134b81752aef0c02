"""Get at a tensor's bytes: whole, row by row, or as a stream. Memory stays small.

A lookup in a 100 GB table reads the rows that it touches and what lies close between them; streams
go through a few reused buffers. All is read from files that are held (`held_files`). Bytes of our
own files are compared with their digests on the way (`Guard`).
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np

from dmt_convert.arrays import AnyArray, Float32Array, IntArray
from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES, ByteRows, Piece, TensorInfo
from dmt_convert.checkpoint.held_files import FileIdentity, HeldFile
from dmt_convert.checkpoint.inert.objects import TensorRef
from dmt_convert.checkpoint.inert.unpickler import read_pickle
from dmt_convert.checkpoint.row_reads import read_ranges
from dmt_convert.checkpoint.torch_archive import read_zip_archive
from dmt_convert.errors import CheckpointError

CHUNK_BYTES: Final = 8 << 20
"""Size of the buffers through which tensors stream, in bytes."""
ZEROS: Final = np.zeros(CHUNK_BYTES, dtype=np.uint8)
"""A chunk of zeros; stands for a hole in a sparse file."""
_ROWS_PER_STEP: Final = 16_384
"""Rows of a tensor that lies in no file which are streamed at a time, at most."""
_SPREAD: Final = 8
"""A row of a strided view is read whole if it takes up to so many times its bytes."""

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


def resolve_pieces(info: TensorInfo) -> tuple[Piece, ...]:
    """Return where the tensor's elements lie, looking into `torch.save` pieces.

    A derived tensor lies nowhere: its sources do.

    Raises:
        CheckpointError: A piece is damaged, or is not the tensor that the header promised.
    """
    return tuple(
        piece if piece.encoding == "raw" else _resolve(piece, info.dtype, info.path)
        for piece in info.pieces
    )


def _resolve(piece: Piece, dtype: str, name: str) -> Piece:
    file = piece.held
    found = _look_into(piece, dtype, name, file.identity)
    file.check_unchanged(by_name=True)  # the archive's header was read under the file's name
    return replace(found, file=file)


@lru_cache(maxsize=65536)
def _look_into(piece: Piece, dtype: str, name: str, _: FileIdentity) -> Piece:
    """Find a tensor in an archive; the same file is looked into once."""
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
    return replace(archive.piece(tensor, name=name, starts=piece.starts), file=None)


def gather_rows(info: TensorInfo, rows: IntArray) -> Float32Array:
    """Read some rows of a table as fp32.

    Args:
        info: A tensor of shape (rows, N), or (rows,), in fp32, fp16, bf16 or fp64.
        rows: Row indices, shape (n,), each within the table; sorted indices read fastest.

    Returns:
        The rows, shape (n, N), float32; N is 1 for a vector.
    """
    return to_fp32(gather_bytes(info, rows), info.dtype)


def gather_bytes(info: TensorInfo, rows: IntArray) -> ByteRows:
    """Read some rows of a tensor of any rank and dtype as they are stored.

    Args:
        info: The tensor; what its first axis counts are its rows.
        rows: Row indices, shape (n,), each within the tensor; sorted indices read fastest.

    Returns:
        Their bytes, shape (n, bytes per row).
    """
    if info.derivation is not None:
        return info.derivation.gather(rows)
    pieces = [_as_matrix(piece, info) for piece in resolve_pieces(info)]
    if None in pieces:  # blocks of a tensor of three axes or more, which is not a table
        return _read_bytes(info).reshape(info.shape[0], -1)[rows]
    item = ITEM_BYTES[info.dtype]
    out = np.empty((len(rows), math.prod(info.shape[1:]) * item), dtype=np.uint8)
    for piece in pieces:
        assert piece is not None
        _gather_piece(piece, item, rows, out)
    return out


def _as_matrix(piece: Piece, info: TensorInfo) -> Piece | None:
    """Describe a block by its rows alone, as of a table; None if that is impossible."""
    if len(piece.sizes) == 2:
        return piece
    inner = math.prod(piece.sizes[1:])
    strides = piece.strides
    if len(piece.sizes) > 1 and (strides is not None or piece.sizes[1:] != info.shape[1:]):
        return None
    return replace(
        piece,
        starts=(*piece.starts[:1], 0) if piece.starts else (0, 0),
        sizes=(*piece.sizes[:1], inner) if piece.sizes else (1, 1),
        strides=None if not strides else (*strides, 1),
    )


def _gather_piece(piece: Piece, item: int, rows: IntArray, out: ByteRows) -> None:
    (row, col), (num_rows, num_cols) = piece.starts, piece.sizes
    picked = np.flatnonzero((rows >= row) & (rows < row + num_rows))
    if num_cols == 0 or not len(picked):
        return
    wanted = rows[picked] - row
    if (np.diff(wanted) < 0).any():
        order = np.argsort(wanted, kind="stable")
        picked, wanted = picked[order], wanted[order]
    across, along = (step * item for step in piece.strides or (num_cols, 1))
    extent = (num_cols - 1) * along + item
    if extent <= _SPREAD * num_cols * item:
        block = _read_ranges(piece, piece.offset + wanted * across, extent)
        elements = np.lib.stride_tricks.as_strided(
            block, (len(block), num_cols, item), (block.strides[0], along, 1), writeable=False
        )
        out[picked, col * item : (col + num_cols) * item] = elements.reshape(len(block), -1)
        return
    for column in range(num_cols):  # a transposed table: its columns lie together
        block = _read_ranges(piece, piece.offset + column * along + wanted * across, item)
        out[picked, (col + column) * item : (col + column + 1) * item] = block


def _read_ranges(piece: Piece, begins: IntArray, width: int) -> ByteRows:
    file = piece.held
    if piece.guard is not None:
        piece.guard.check_ranges(file, begins, width)
    return read_ranges(file, begins, width)


def read_tensor(info: TensorInfo) -> AnyArray:
    """Read a whole tensor; bf16 comes as fp32, all other dtypes as they are.

    For tensors that fit in memory (the dense parts); tables are streamed or gathered.
    """
    raw = _read_bytes(info)
    if info.dtype == "bf16":
        return to_fp32(raw.reshape(1, -1), "bf16").reshape(info.shape)
    return raw.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def check_finite(array: AnyArray, origin: str) -> None:
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
    for piece in resolve_pieces(info):
        block = np.concatenate([*_piece_chunks(piece, item)] or [np.empty(0, np.uint8)])
        where = tuple(slice(a, a + n) for a, n in zip(piece.starts, piece.sizes, strict=True))
        out[where] = block.reshape(*piece.sizes, item)
    return out.reshape(-1)


def _chunks(info: TensorInfo) -> Iterator[ByteRows]:
    for chunk in stream_tensor(info):
        yield chunk.copy()


def _piece_chunks(piece: Piece, item: int) -> Iterator[ByteRows]:
    if piece.strides is not None:
        yield from _strided_chunks(piece, item)
        return
    for chunk in stream_piece(piece, item):
        yield chunk.copy()


def stream_tensor(info: TensorInfo) -> Iterator[ByteRows]:
    """Yield a tensor's bytes in row-major order through a few reused buffers.

    Every chunk is a whole number of elements, valid until the next but one is asked for.
    """
    if info.derivation is not None:
        yield from _stream_rows(info)
        return
    pieces = sorted(resolve_pieces(info), key=lambda piece: piece.starts)
    pieces = [s for s in pieces if all(size > 0 for size in s.sizes)]
    item = ITEM_BYTES[info.dtype]
    if not pieces:
        return
    full_width = all(s.sizes[1:] == info.shape[1:] for s in pieces)
    strided_table = len(info.shape) == 2 and any(s.strides is not None for s in pieces)
    if full_width and not strided_table:
        for piece in pieces:
            if piece.strides is not None:
                yield from _strided_chunks(piece, item)
            else:
                yield from stream_piece(piece, item)
    else:
        yield from _stream_rows(info)


def stream_piece(piece: Piece, item: int) -> Iterator[ByteRows]:
    """Yield the bytes of a row-major piece of elements of `item` bytes each.

    A chunk is valid until the next but one is asked for, so that reading ahead is safe. Where
    the file has a hole of a whole chunk, `ZEROS` itself (or its beginning) is yielded.

    Raises:
        CheckpointError: The file changed since it was opened, or ends before.
        DmtError: It is one of ours, and its bytes are not those that were written.
    """
    file, length = piece.held, item * math.prod(piece.sizes)
    chunks = stream_bytes(file, piece.offset, length)
    if piece.guard is None:
        return chunks
    return piece.guard.check_stream(file, piece.offset, length, chunks)


def stream_bytes(file: HeldFile, offset: int, length: int) -> Iterator[ByteRows]:
    """Yield a range of a file, compared with nothing; chunks are as in `stream_piece`."""
    buffers = [bytearray(min(CHUNK_BYTES, length)) for _ in range(3)]
    with file.open() as descriptor:
        done = 0
        for turn in range(-(-length // CHUNK_BYTES)):
            want = min(CHUNK_BYTES, length - done)
            if want == CHUNK_BYTES and _is_hole(descriptor, offset + done, want):
                yield ZEROS
            else:
                view = memoryview(buffers[turn % 3])[:want]
                file.read_into(descriptor, offset + done, view)
                yield np.frombuffer(view, dtype=np.uint8)
            done += want


def _is_hole(descriptor: int, offset: int, length: int) -> bool:
    """Tell whether a range of a sparse file was never written."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        # ENXIO: no data behind offset, if offset is within the file at all
        size = os.fstat(descriptor).st_size
        return error.errno == errno.ENXIO and size >= offset + length


def _strided_chunks(piece: Piece, item: int) -> Iterator[ByteRows]:
    """Yield a block that was saved as a transposed or sliced view, row-major."""
    assert piece.strides is not None
    extent = item + sum((n - 1) * s * item for n, s in zip(piece.sizes, piece.strides, strict=True))
    raw = np.empty(extent, dtype=np.uint8)
    file = piece.held
    if piece.guard is not None:
        piece.guard.check_ranges(file, np.array([piece.offset]), extent)
    with file.open() as descriptor:
        file.read_into(descriptor, piece.offset, raw.data)
    strides = (*(s * item for s in piece.strides), 1)
    block = np.lib.stride_tricks.as_strided(raw, (*piece.sizes, item), strides, writeable=False)
    yield np.ascontiguousarray(block).reshape(-1)


def _stream_rows(info: TensorInfo) -> Iterator[ByteRows]:
    """Stream what lies in no file row by row (sharded columns, a derived tensor)."""
    if info.derivation is None and len(info.shape) != 2:  # not a table, and small
        yield _read_bytes(info)
        return
    rows = info.shape[0] if info.shape else 1
    step = max(1, min(_ROWS_PER_STEP, CHUNK_BYTES * rows // max(1, info.nbytes)))
    for begin in range(0, rows if info.nbytes else 0, step):
        index = np.arange(begin, min(begin + step, rows), dtype=np.int64)
        yield gather_bytes(info, index).reshape(-1)


def to_fp32(raw: ByteRows, dtype: str) -> Float32Array:
    """Read the bytes of (n, N) elements of a float dtype as float32, shape (n, N)."""
    if dtype == "bf16":
        wide = raw.view(np.dtype("<u2")).astype(np.uint32) << 16
        return wide.view(np.float32)
    return raw.view(NUMPY_DTYPES[dtype]).astype(np.float32, copy=False)
