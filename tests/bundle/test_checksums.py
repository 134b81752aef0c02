"""Checksums that a checkpoint stores are compared wherever its bytes are read."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.checkpoint import Piece, TensorInfo
from dmt_convert.errors import CheckpointError
from dmt_convert.files.digest import check_checksums, stream_checked


def sharded(folder: Path, *, columns: bool) -> tuple[TensorInfo, np.ndarray]:
    """A table in two blocks, each in a file of its own with a checksum."""
    table = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    pieces = []
    for i in range(2):
        block = table[:, 2 * i : 2 * i + 2] if columns else table[3 * i : 3 * i + 3]
        data = np.ascontiguousarray(block).tobytes()
        path = folder / f"block{i}"
        path.write_bytes(data)
        pieces.append(
            Piece(
                path=path,
                offset=0,
                length=len(data),
                starts=(0, 2 * i) if columns else (3 * i, 0),
                sizes=block.shape,
                crc32=zlib.crc32(data),
            )
        )
    return TensorInfo(name="t", dtype="fp32", shape=(6, 4), pieces=tuple(pieces)), table


@pytest.mark.parametrize("columns", [False, True])
def test_a_flip_in_any_block_is_found(tmp_path: Path, columns: bool) -> None:
    info, table = sharded(tmp_path, columns=columns)
    stored = b"".join(chunk.tobytes() for chunk in stream_checked(info, "table 't'"))
    assert stored == table.tobytes()
    check_checksums(info, "table 't'")
    for i in range(2):
        path = tmp_path / f"block{i}"
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)
        for read in (check_checksums, lambda *args: list(stream_checked(*args))):
            with pytest.raises(CheckpointError, match=f"table 't' in block{i} has the checksum"):
                read(info, "table 't'")
        data[7] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("columns", [False, True])
def test_blocks_without_checksums_pass(tmp_path: Path, columns: bool) -> None:
    info, table = sharded(tmp_path, columns=columns)
    pieces = tuple(replace(piece, crc32=None) for piece in info.pieces)
    bare = replace(info, pieces=pieces)
    check_checksums(bare, "t")
    assert b"".join(c.tobytes() for c in stream_checked(bare, "t")) == table.tobytes()
