"""A file stays the one whose header was read; it is replaced, rewritten and cut short."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.checkpoint import (
    Piece,
    TensorInfo,
    gather_bytes,
    held_files,
    open_checkpoint,
    read_tensor,
    stream_tensor,
)
from dmt_convert.checkpoint.held_files import HeldFile
from dmt_convert.checkpoint.row_reads import read_ranges
from dmt_convert.errors import CheckpointError
from support.checkpoints.flat import flat_state, save_flat

ROWS = np.array([0, 3, 3, 49])
Damage = Callable[[Path], object]


def rewrite(path: Path) -> None:
    """Write other bytes of the same size into the file, as a trainer that saves over it."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(64))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


READS: dict[str, Callable[[TensorInfo], object]] = {
    "gather": lambda info: gather_bytes(info, ROWS),
    "stream": lambda info: [*stream_tensor(info)],
    "read": read_tensor,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("damage", [rewrite, cut])
@pytest.mark.parametrize("read", READS)
def test_a_file_that_changed_is_refused(
    tmp_path: Path, suffix: str, damage: Damage, read: str
) -> None:
    source = save_flat(tmp_path / f"ckpt{suffix}", flat_state())
    checkpoint = open_checkpoint(source)
    table = next(t for t in checkpoint.tensors if t.shape == (50, 8))
    READS[read](table)
    for path in {piece.path for piece in table.pieces}:
        damage(path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        READS[read](table)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.check_unchanged()


def test_a_file_that_was_replaced_is_read_on(tmp_path: Path) -> None:
    source = save_flat(tmp_path / "ckpt.safetensors", flat_state())
    checkpoint = open_checkpoint(source)
    before = [read_tensor(tensor) for tensor in checkpoint.tensors]
    save_flat(tmp_path / "new.safetensors", flat_state(seed=1)).replace(source)
    after = [read_tensor(tensor) for tensor in checkpoint.tensors]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    checkpoint.check_unchanged()


def test_a_tool_that_sets_the_time_back(tmp_path: Path) -> None:
    source = save_flat(tmp_path / "ckpt.safetensors", flat_state())
    checkpoint = open_checkpoint(source)
    source.chmod(0o640)  # which changes nothing that is read
    checkpoint.check_unchanged()
    checkpoint = open_checkpoint(source)
    time = source.stat().st_mtime_ns
    rewrite(source)
    os.utime(source, ns=(time, time))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.check_unchanged()


def test_of_several_files_none_may_be_replaced(tmp_path: Path) -> None:
    """Some may have been replaced before they were opened."""
    source = save_flat(tmp_path / "ckpt", flat_state())
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.held) == 1
    other = HeldFile(source / ".metadata")
    both = type(checkpoint)(
        **{name: getattr(checkpoint, name) for name in checkpoint.__slots__}
        | {"held": (*checkpoint.held, other)}
    )
    both.check_unchanged()
    (shard,) = source.glob("*.distcp")
    (source / "new").write_bytes(shard.read_bytes())
    (source / "new").replace(shard)
    with pytest.raises(CheckpointError, match="was replaced by another file"):
        both.check_unchanged()
    shard.unlink()  # a trainer that keeps its last few checkpoints: all was read before
    both.check_unchanged()


def test_a_file_that_changes_while_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_flat(tmp_path / "ckpt.safetensors", flat_state())
    from dmt_convert.checkpoint.readers import registry

    opened = registry._open

    def late(path: Path) -> object:
        rewrite(path)
        return opened(path)

    monkeypatch.setattr(registry, "_open", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        open_checkpoint(source)


def make_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"file{i}" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 8)
    return paths


def open_descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_there_may_be_more_files_than_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_files, "_MOST_DESCRIPTORS", 3)
    held_files._DESCRIPTORS.close_idle()
    paths = make_files(tmp_path, 10)
    before = open_descriptors()
    files = [HeldFile(path) for path in paths]
    assert open_descriptors() <= before + 3
    for i, file in enumerate(files):
        assert (read_ranges(file, np.array([1]), 2) == i).all()
    # one that was closed, and is another one when it is opened again
    paths[0].rename(tmp_path / "old")
    paths[0].write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match="was replaced by another file"):
        read_ranges(files[0], np.array([0]), 1)
    files.clear()
    assert open_descriptors() <= before + 1


def test_copies_read_the_same_file(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, 1)
    file = HeldFile(path)
    for other in (copy.deepcopy(file), pickle.loads(pickle.dumps(file))):
        assert other.identity == file.identity
    rewrite_path = path.with_suffix(".new")
    rewrite_path.write_bytes(bytes(8))
    stored = pickle.dumps(file)
    rewrite_path.replace(path)
    with pytest.raises(CheckpointError, match="was replaced"):
        pickle.loads(stored)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        HeldFile(tmp_path / "pipe")


def test_an_error_of_the_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = make_files(tmp_path, 1)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    file = HeldFile(path)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="file0"):
        read_ranges(file, np.array([0]), 1)


@given(
    st.lists(st.integers(0, 299), max_size=40),
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(1, 200),
)
def test_ranges_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    begins: list[int],
    width: int,
    gap: int,
    block: int,
) -> None:
    """Whatever is read together, and however much at a time."""
    content = np.arange(340, dtype=np.uint16).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / "ranges"
    if not path.exists():
        path.write_bytes(content.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmt_convert.checkpoint.row_reads._GAP_BYTES", gap)
        patch.setattr("dmt_convert.checkpoint.row_reads._BLOCK_BYTES", block)
        found = read_ranges(HeldFile(path), np.array(sorted(begins), dtype=np.int64), width)
    expected = [content[begin : begin + width] for begin in sorted(begins)]
    assert found.tolist() == [row.tolist() for row in expected]


@given(st.data())
def test_rows_of_any_strides(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Contiguous, sliced, transposed and repeated views, in any order of rows."""
    content = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / "strides"
    if not path.exists():
        path.write_bytes(content.tobytes())
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    strides = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    piece = Piece(
        path=path, offset=4, length=0, starts=(0, 0), sizes=(rows, columns), strides=strides
    )
    info = TensorInfo(name="t", dtype="fp32", shape=(rows, columns), pieces=(piece,))
    index = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=12)), dtype=np.int64)
    values = content[4:].view("<f4")
    expected = [
        [values[r * strides[0] + c * strides[1]] for c in range(columns)] for r in index.tolist()
    ]
    found = gather_bytes(info, index)
    assert found.tobytes() == np.array(expected, dtype="<f4").tobytes()
