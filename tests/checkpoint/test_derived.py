"""Derived tensors hold what numpy computes, however they are read; their sources are checked."""

import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.checkpoint import (
    Piece,
    TensorInfo,
    gather_bytes,
    gather_rows,
    read_tensor,
    stream_tensor,
)
from dmt_convert.checkpoint import derived as d
from dmt_convert.checkpoint.derived_rows import RowCodes
from dmt_convert.errors import CheckpointError
from dmt_convert.files.digest import check_checksums, digest_of, stream_checked

RNG = np.random.default_rng(0)
T = RNG.standard_normal((12, 6)).astype(np.float32)
Q = RNG.standard_normal((4, 6)).astype(np.float32)
W = RNG.standard_normal((5, 6)).astype(np.float32)
V = RNG.standard_normal(12).astype(np.float32)
K = RNG.standard_normal((2, 3, 4)).astype(np.float32)
H = T.astype(np.float16)


def store(folder: Path, values: np.ndarray, blocks: int = 1, *, crc: bool = False) -> TensorInfo:
    """Write an array in blocks of rows into one file."""
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    pieces, begin, offset = [], 0, 3
    with path.open("wb") as file:
        file.write(b"xyz")
        for block in np.array_split(values, blocks):
            data = block.tobytes()
            file.write(data)
            pieces.append(
                Piece(
                    path=path,
                    offset=offset,
                    length=len(data),
                    starts=(begin, *[0] * (values.ndim - 1)),
                    sizes=block.shape,
                    crc32=zlib.crc32(data) if crc else None,
                )
            )
            begin, offset = begin + len(block), offset + len(data)
    dtype = {"f": "fp32", "e": "fp16", "B": "uint8"}[values.dtype.char]
    return TensorInfo(name=path.stem, dtype=dtype, shape=values.shape, pieces=tuple(pieces))


Store = Callable[[np.ndarray], TensorInfo]
ORDER = [4, 0, 5, 5, 1]
CASES: dict[str, tuple[Callable[[Store], TensorInfo], np.ndarray]] = {
    "columns": (lambda s: d.select_columns(s(T), [5, -1, 0]), T[:, [5, 0, 0]] * [1, 0, 1]),
    "half columns": (lambda s: d.select_columns(s(H), [5, 0]), H[:, [5, 0]]),
    "rows": (lambda s: d.select_rows(s(T), ORDER), T[ORDER]),
    "elements": (lambda s: d.select_rows(s(V), ORDER), V[ORDER]),
    "slice": (lambda s: d.slice_rows(s(T), 3, 9), T[3:9]),
    "slice of rank 3": (lambda s: d.slice_rows(s(K), 1, 2), K[1:2]),
    "index": (lambda s: d.take_index(s(K), 1), K[1]),
    "vector to table": (lambda s: d.reshape(s(V), (4, 3)), V.reshape(4, 3)),
    "wider": (lambda s: d.reshape(s(T), (4, 18)), T.reshape(4, 18)),
    "narrower": (lambda s: d.reshape(s(T), (36, 2)), T.reshape(36, 2)),
    "askew": (lambda s: d.reshape(s(T), (18, 4)), T.reshape(18, 4)),
    "transpose": (lambda s: d.transpose(s(T)), T.T),
    "side by side": (lambda s: d.concat_columns(s(T), s(V)), np.c_[T, V]),
    "half beside": (lambda s: d.concat_columns(s(H), s(T)), np.c_[H.astype("f4"), T]),
    "below": (lambda s: d.concat_rows(s(T), s(Q)), np.r_[T, Q]),
    "mult": (lambda s: d.combine_rows(s(Q), s(W), "mult"), np.repeat(Q, 5, 0) * np.tile(W, (4, 1))),
    "add": (lambda s: d.combine_rows(s(Q), s(W), "add"), np.repeat(Q, 5, 0) + np.tile(W, (4, 1))),
    "concat": (
        lambda s: d.combine_rows(s(Q), s(W), "concat"),
        np.c_[np.repeat(Q, 5, 0), np.tile(W, (4, 1))],
    ),
    "project": (
        lambda s: d.project_rows(s(H), s(W)),
        (H.astype("f8") @ W.T.astype("f8")).astype("f4"),
    ),
    "scale": (lambda s: d.scale_rows(s(T), s(V)), T * V[:, None]),
    "fill": (lambda s: d.fill("zeros", (3, 2), 0.5), np.full((3, 2), 0.5)),
    "nested": (
        lambda s: d.select_columns(d.transpose(d.concat_rows(s(Q), s(T))), [9, 2]),
        np.r_[Q, T].T[:, [9, 2]],
    ),
}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_way_of_reading_gives_what_numpy_gives(tmp_path, case, blocks):
    build, expected = CASES[case]
    info = build(lambda values: store(tmp_path, values, blocks, crc=blocks == 1))
    assert info.shape == expected.shape
    whole = read_tensor(info)
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-7)
    if case != "project":
        np.testing.assert_array_equal(whole, expected)
    assert b"".join(chunk.tobytes() for chunk in stream_tensor(info)) == whole.tobytes()
    assert b"".join(c.tobytes() for c in stream_checked(info, case)) == whole.tobytes()
    rows = np.array([len(whole) - 1, 0, len(whole) // 2, 0])
    assert gather_bytes(info, rows).tobytes() == whole[rows].tobytes()
    if info.dtype == "fp32" and whole.ndim < 3:
        np.testing.assert_array_equal(gather_rows(info, rows), whole[rows].reshape(4, -1))
    assert digest_of(info) == digest_of(store(tmp_path, whole))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_rows_of_bytes_are_decoded(tmp_path, dtype, at_end):
    codes = RNG.integers(0, 256, (7, 6), dtype=np.uint8)
    numbers = RNG.standard_normal((7, 2)).astype({"fp16": "<f2", "fp32": "<f4"}[dtype])
    parts = [codes, numbers.view(np.uint8)] if at_end else [numbers.view(np.uint8), codes]
    raw = np.concatenate([*parts, np.full((7, 2), 99, np.uint8)], axis=1)
    info = d.dequantise_rows(store(tmp_path, raw), 6, RowCodes(dtype=dtype, at_end=at_end))
    scale, bias = numbers.astype(np.float32).T[:, :, None]
    np.testing.assert_array_equal(read_tensor(info), codes * scale + bias)


def test_an_order_that_changes_nothing_costs_nothing(tmp_path):
    info = store(tmp_path, T)
    assert d.select_columns(info, range(6)) is info
    assert d.slice_rows(info, 0, 12) is info and d.reshape(info, (12, 6)) is info
    assert d.slice_rows(info, 1, 5).derivation is None  # a range of bytes stays one
    assert d.reshape(info, (6, 12)).derivation is None


def test_a_flip_in_a_source_is_found(tmp_path):
    row = d.select_rows(store(tmp_path, W, crc=True), [1])
    info = d.combine_rows(store(tmp_path, Q), row, "add")
    check_checksums(info, "table 't'")
    path = tmp_path / "0.bin"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    for read in (check_checksums, lambda *args: list(stream_checked(*args))):
        with pytest.raises(CheckpointError, match=r"0, of which .*'t'.* is made, in 0.bin has the"):
            read(info, "table 't'")


SCRIPT = """
import sys
from pathlib import Path
from dmt_convert.checkpoint import Piece, TensorInfo, stream_tensor
from dmt_convert.checkpoint import derived as d
path, shape = Path(sys.argv[1]), (1 << 20, 64)
def table():
    piece = Piece(path=path, offset=0, length=4 << 26, starts=(0, 0), sizes=shape)
    return TensorInfo(name="t", dtype="fp32", shape=shape, pieces=(piece,))
product = d.project_rows(table(), d.fill("w", (1, 64)))
info = d.concat_columns(product, d.select_columns(table(), [0, 9]))
total = sum(chunk.nbytes for chunk in stream_tensor(info))
assert total == info.nbytes == 12 << 20, total
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_a_long_table_takes_little_memory(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 << 26)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 120 << 10, run.stdout
