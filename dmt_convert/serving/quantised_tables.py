"""Write a tower's weights with coded tables: one pass over every table, some rows in memory.

The file holds first what is read by id, tables of one kind side by side, so that tables of one
width can be addressed as one: all `tables.T.quantized`, all `tables.T.scale`, all
`tables.T.zero_point` (or all `tables.T.weight` in fp16), then the tower's module.

Letters: R rows, N embedding dim, W bytes of a coded row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dmt_convert.bundle import read_rows
from dmt_convert.checkpoint import ByteRows, TensorInfo, read_safetensors, stream_tensor
from dmt_convert.files import TreeDigest, safetensors_header
from dmt_convert.model import RowCode, coded_width, encode_rows, to_half
from dmt_convert.spec import TableSpec

OnBytes = Callable[[int], None]
_KINDS: Final = ("quantized", "scale", "zero_point")
_MAX_CODERS: Final = 8
"""Threads that code rows; one thread reads for them and one writes."""


def coded_bytes(table: TableSpec, code: RowCode) -> int:
    """Bytes that a table takes in a code."""
    if code == "fp16":
        return table.rows * table.dim * 2
    return table.rows * (coded_width(table.dim, code) + 5)


def write_coded(
    target: Path,
    tensors: Mapping[str, TensorInfo],
    code: RowCode,
    on_bytes: OnBytes = lambda count: None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the weights of a tower, its tables coded.

    Args:
        target: Where to; must not exist. Its mode is 0644, whatever the umask says.
        tensors: The tower's tensors in a bundle, by name.
        code: How to store its tables.
        on_bytes: Told of every piece of a table that was coded, in bytes as they were read.

    Returns:
        Digests of what was written, and of what was read, by tensor.

    Raises:
        ExportError: The code does not take a row.
        OSError: The disk is full, or fails.
    """
    layout = _layout(tensors, code)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.fchmod(descriptor, 0o644)
        header = safetensors_header(layout, {"format": "pt", "dmt_code": code})
        _write_at(descriptor, memoryview(header), 0)
        os.ftruncate(descriptor, len(header) + sum(info.nbytes for info in layout))
        places = {info.name: info for info in read_safetensors(target).tensors}
        outputs = {name: _Output(descriptor, info) for name, info in places.items()}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_CODERS)) as coders:
            read = {
                name: _copy(info, outputs[name])
                if _table_of(name) is None
                else _code(info, outputs, code, coders, on_bytes)
                for name, info in tensors.items()
            }
    finally:
        os.close(descriptor)
    return {name: output.finish() for name, output in outputs.items()}, read


def read_ahead(chunks: Iterator[ByteRows], digest: TreeDigest) -> Iterator[ByteRows]:
    """Read and digest the next chunk of a stream while one is worked on."""

    def read() -> ByteRows | None:
        chunk = next(chunks, None)
        if chunk is not None:
            digest.update(chunk)
        return chunk

    with ThreadPoolExecutor(1) as reader:
        ahead: Future[ByteRows | None] = reader.submit(read)
        while (chunk := ahead.result()) is not None:
            ahead = reader.submit(read)
            yield chunk


class _Output:
    """A tensor on its way to its place in the file; runs of zeros become holes."""

    def __init__(self, descriptor: int, info: TensorInfo) -> None:
        (piece,) = info.pieces
        self._descriptor, self._position = descriptor, piece.offset
        self._end = piece.offset + piece.length
        self._digest = TreeDigest()

    def write(self, array: npt.NDArray[Any]) -> None:
        """Append elements."""
        chunk = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._digest.update(chunk)
        if chunk.any():
            _write_at(self._descriptor, chunk.data, self._position)
        self._position += chunk.nbytes

    def finish(self) -> str:
        """Return the digest of the tensor."""
        assert self._position == self._end
        return self._digest.finish()


def _layout(tensors: Mapping[str, TensorInfo], code: RowCode) -> list[TensorInfo]:
    tables = {name: info for name, info in tensors.items() if _table_of(name) is not None}
    rest = [info for name, info in tensors.items() if name not in tables]
    if code == "fp16":
        return [_described(name, "fp16", info.shape) for name, info in tables.items()] + rest
    coded = []
    for kind in _KINDS:
        for name, (rows, dim) in ((name, info.shape) for name, info in tables.items()):
            shape = (rows, coded_width(dim, code)) if kind == "quantized" else (rows,)
            coded.append(
                _described(_coded_name(name, kind), "fp32" if kind == "scale" else "uint8", shape)
            )
    return coded + rest


def _described(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape, pieces=())


def _table_of(name: str) -> str | None:
    """Table whose weight bears a name; None for what is no table."""
    if not name.startswith("tables."):
        return None
    return name.removeprefix("tables.").removesuffix(".weight")


def _coded_name(name: str, kind: str) -> str:
    return f"{name.removesuffix('.weight')}.{kind}"


def _copy(info: TensorInfo, output: _Output) -> str:
    digest = TreeDigest()
    for chunk in read_ahead(stream_tensor(info), digest):
        output.write(chunk)
    return digest.finish()


def _code(
    info: TensorInfo,
    outputs: Mapping[str, _Output],
    code: RowCode,
    coders: ThreadPoolExecutor,
    on_bytes: OnBytes,
) -> str:
    """Code one table; returns the digest of what was read."""
    digest = TreeDigest()
    kinds = ("weight",) if code == "fp16" else _KINDS
    targets = [outputs[_coded_name(info.name, kind)] for kind in kinds]
    row_bytes = info.nbytes // max(1, info.shape[0])
    first = 0
    for rows in read_rows(info, read_ahead(stream_tensor(info), digest)):
        step = -(-len(rows) // _MAX_CODERS)
        parts = [
            coders.submit(_code_part, rows[begin : begin + step], code, info.name, first + begin)
            for begin in range(0, len(rows), step)
        ]
        # all of them, before their rows' buffer is filled anew
        for arrays in [part.result() for part in parts]:
            for target, array in zip(targets, arrays, strict=True):
                target.write(array)
        first += len(rows)
        on_bytes(len(rows) * row_bytes)
    return digest.finish()


def _code_part(
    rows: npt.NDArray[np.float32], code: RowCode, name: str, first: int
) -> Sequence[npt.NDArray[Any]]:
    name_row = partial(_name_row, name, first)
    if code == "fp16":
        return (to_half(rows, name_row),)
    coded = encode_rows(rows, code, name_row)
    return coded.quantized, coded.scale, coded.zero_point


def _name_row(name: str, first: int, row: int) -> str:
    return f"row {first + row} of table {_table_of(name)!r}"


def _write_at(descriptor: int, view: memoryview, position: int) -> None:
    while len(view):
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
