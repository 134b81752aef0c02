"""Blocks written past the page cache hold what was given, wherever that is possible."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.files import aligned_writer
from dmt_convert.files.aligned_writer import ALIGNMENT, AlignedWriter

BLOCK = 2 * ALIGNMENT


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned_writer, "CHUNK_BYTES", BLOCK)
    monkeypatch.setattr(aligned_writer, "ZEROS", np.zeros(BLOCK, dtype=np.uint8))


def write(path: Path, begin: int, parts: list[bytes | None]) -> bytes:
    """Write parts, None for a hole of one block; returns what the file should hold."""
    expected = bytes(begin)
    with AlignedWriter(path, begin) as writer:
        for part in parts:
            data = aligned_writer.ZEROS if part is None else np.frombuffer(part, dtype=np.uint8)
            writer.write(data)
            expected += data.tobytes()
    return expected


part = st.one_of(st.none(), st.integers(1, 3 * BLOCK).map(lambda n: (b"0123456789" * n)[:n]))


@given(parts=st.lists(part, max_size=6), begin=st.sampled_from([0, ALIGNMENT]))
def test_any_parts(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes | None], begin: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "x"
    expected = write(path, begin, parts)
    assert path.read_bytes() == expected


def test_holes_take_no_space(tmp_path: Path) -> None:
    write(tmp_path / "x", 0, [b"a" * BLOCK, *[None] * 50, b"b"])
    assert (tmp_path / "x").stat().st_blocks * 512 < 10 * BLOCK


def test_a_file_system_that_refuses_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse the flag (tmpfs of older kernels), some the first write."""
    real, refused = os.pwrite, 0

    def refuse_direct(descriptor: int, data: memoryview, at: int) -> int:
        nonlocal refused
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, at)

    with AlignedWriter(tmp_path / "probe", 0) as writer:
        direct = fcntl.fcntl(writer._descriptor, fcntl.F_GETFL) & os.O_DIRECT
    if not direct:
        pytest.skip("the file system of the tests takes no O_DIRECT")
    monkeypatch.setattr(os, "pwrite", refuse_direct)
    data = os.urandom(3 * BLOCK + 5)
    assert (tmp_path / "x").exists() is False
    expected = write(tmp_path / "x", 0, [data])
    assert 1 <= refused <= 3  # every block in flight may meet the refusal once
    assert (tmp_path / "x").read_bytes() == expected


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:4096], at))
    data = os.urandom(3 * BLOCK + 5)
    expected = write(tmp_path / "x", 0, [data])
    assert (tmp_path / "x").read_bytes() == expected


def test_an_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x", 0, [b"x" * BLOCK])


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        AlignedWriter(tmp_path / "x", 0)
    assert (tmp_path / "x").read_text() == "precious"
