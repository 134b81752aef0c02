"""Damaged and hostile files: always a CheckpointError, never a traceback, never code that runs."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint, read_tensor, stream_tensor
from dmt_convert.checkpoint.inert.objects import TENSOR_GLOBALS, StorageType
from dmt_convert.errors import CheckpointError
from support.checkpoints.containers import SAVES


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def write_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Write an archive as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/byteorder", b"little")
        for key, raw in (storages or {}).items():
            archive.writestr(f"model/data/{key}", raw)
    return path


def write_legacy(path: Path, data: bytes, order: object = ()) -> Path:
    head = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    path.write_bytes(head + data + pickle.dumps([*order], protocol=2))
    return path


def write_metadata(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)
    return folder


def pickled_tensor(
    shape: bytes, strides: bytes, *, numel: bytes = b"K\x0c", end: bytes = b""
) -> bytes:
    """Pickle a dict with one fp32 tensor over storage 0, by hand."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    return (
        b"\x80\x02}X\x01\x00\x00\x00w"
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        b"(" + storage + numel + b"tQK\x00" + shape + strides + b"\x89NtR" + end + b"s."
    )


def test_missing_empty_and_unknown(tmp_path):
    refuse(tmp_path / "no.pt", "does not exist")
    (tmp_path / "empty.pt").touch()
    refuse(tmp_path / "empty.pt", "is empty")
    (tmp_path / "text.pt").write_text("hello world")
    refuse(tmp_path / "text.pt", "begins with the bytes 68 65")
    (tmp_path / "one.pt").write_bytes(b"\x80")
    refuse(tmp_path / "one.pt", "begins with")
    refuse(tmp_path, "is a directory, and not a checkpoint")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(state, tmp_path):
    path = SAVES["torch"](state, tmp_path)
    path.chmod(0)
    refuse(path, "cannot be read")


def test_an_os_error_is_the_users(state, tmp_path, monkeypatch):
    path = SAVES["torch"](state, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", fail)
    refuse(path, "Permission denied")


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_truncated_files(kind, state, tmp_path):
    path = SAVES[kind](state, tmp_path)
    raw = path.read_bytes()
    for cut in sorted({1, 2, 5, 8, 9, 20, len(raw) - 1, *range(10, len(raw), len(raw) // 40)}):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_truncated_dcp(state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    payload, metadata = folder / "__0_0.distcp", folder / ".metadata"
    raw = payload.read_bytes()
    payload.write_bytes(raw[:-1])
    assert refuse(folder, "lacks 1 of its 1").details[0].startswith("__0_0.distcp: ")
    payload.unlink()
    assert refuse(folder, "lacks 1 of its 1").details == ("__0_0.distcp: missing",)
    payload.write_bytes(raw)
    whole = metadata.read_bytes()
    for cut in range(0, len(whole) - 1, len(whole) // 25):
        metadata.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    metadata.unlink()
    refuse(folder, r"no \.metadata")


def test_a_dcp_payload_that_is_another_tensor(state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    payload = folder / "__0_0.distcp"
    payload.write_bytes(bytes(payload.stat().st_size))
    info = open_checkpoint(folder).tensors[0]
    with pytest.raises(CheckpointError, match="not a whole torch"):
        read_tensor(info)


class _Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ["zip", "legacy", "dcp"])
def test_code_does_not_run(kind, protocol, tmp_path):
    sentinel = tmp_path / "it_ran"
    data = pickle.dumps({"w": _Evil(sentinel)}, protocol=protocol)
    path = {
        "zip": lambda: write_zip(tmp_path / "model.pt", data),
        "legacy": lambda: write_legacy(tmp_path / "model.pt", data),
        "dcp": lambda: write_metadata(tmp_path / "dcp", data),
    }[kind]()
    refuse(path, r"asks to run code while loading: it names (posix|nt)\.system")
    assert not sentinel.exists()
    if protocol == 2 and kind == "zip":
        pickle.loads(data)  # without the reader it does run
        assert sentinel.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "torch load", "numpy.core.multiarray dtype"]
)
def test_only_listed_globals(name, tmp_path):
    data = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
    refuse(write_zip(tmp_path / "model.pt", data), "asks to run code")


def test_shards_and_modules_are_named_as_such(tmp_path):
    shard = b"\x80\x02ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n."
    refuse(write_zip(tmp_path / "a.pt", shard), "one rank's shards")
    module = b"\x80\x02ctorchrec.models.dlrm\nDLRM\n."
    refuse(write_zip(tmp_path / "b.pt", module), "a pickled module, not its weights")


def test_state_cannot_be_set_behind_a_constructor(tmp_path):
    # BUILD on a tensor would replace its checked shape and strides
    state = b"](X\x01\x00\x00\x00xX\x04\x00\x00\x00fp32K\x00\x8a\x01\xff\x85\x8a\x01\xff\x85eb"
    good = pickled_tensor(b"K\x03\x85", b"K\x01\x85")
    assert len(open_checkpoint(write_zip(tmp_path / "a.pt", good, {"0": bytes(48)})).tensors) == 1
    bad = pickled_tensor(b"K\x03\x85", b"K\x01\x85", end=state)
    refuse(write_zip(tmp_path / "b.pt", bad, {"0": bytes(48)}), "state for a TensorRef")
    # and on a global it would change what all later files mean
    poison = b"\x80\x02ctorch\nFloatStorage\n]X\x04\x00\x00\x00fp64ab."
    refuse(write_zip(tmp_path / "c.pt", poison), "state for a StorageType")
    assert TENSOR_GLOBALS["torch", "FloatStorage"] == StorageType("fp32")
    function = b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb."
    refuse(write_zip(tmp_path / "d.pt", function), "state for a function")


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        (b"K\x0d\x85", b"K\x01\x85"),  # 13 of 12 elements
        (b"K\x03K\x04\x86", b"K\x05K\x01\x86"),  # the last row reaches beyond
        (b"K\x03\x85", b"\x8a\x01\xff\x85"),  # a negative stride
        (b"\x8a\x01\xff\x85", b"K\x01\x85"),  # a negative size
        (b"K\x03K\x04\x86", b"K\x01\x85"),  # one stride for two dims
        (b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", b"K\x01\x85"),  # 2**64 - 1 elements
        (b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85", b"K\x01\x85"),  # 2**62 - 1 elements
        (
            b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"\x85",
            b"K\x01\x85",
        ),  # a number of 9866 digits
        (b"]\x85", b"K\x01\x85"),  # a list for a size
        (b"X\x01\x00\x00\x003\x85", b"K\x01\x85"),  # text for a size
    ],
)
def test_lying_shapes(shape, strides, tmp_path):
    data = pickled_tensor(shape, strides)
    refuse(write_zip(tmp_path / "a.pt", data, {"0": bytes(48)}), "damaged pickle|of shape")


def test_a_storage_that_is_not_there(tmp_path):
    data = pickled_tensor(b"K\x03\x85", b"K\x01\x85")
    refuse(write_zip(tmp_path / "a.pt", data), "has no storage")
    refuse(write_zip(tmp_path / "b.pt", data, {"0": bytes(8)}), "a storage of 8 bytes")


def test_storages_without_names(tmp_path):
    data = pickled_tensor(b"K\x0c\x85", b"K\x01\x85")
    refuse(write_legacy(tmp_path / "a.pth", data, [10**5000]), "ends before 1 of its 1 storages")


def test_tensors_that_repeat_a_storage(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", "repeats a storage of 4 bytes")
    torch.save({"w": torch.ones(1).expand(5)}, tmp_path / "a.pt")
    (info,) = open_checkpoint(tmp_path / "a.pt").tensors
    assert read_tensor(info).tolist() == [1.0] * 5


def test_an_unknown_dtype(tmp_path):
    v3 = (
        pickled_tensor(b"K\x03\x85", b"K\x01\x85")
        .replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3")
        .replace(b"\x89NtR", b"\x89NX\x03\x00\x00\x00fp9tR")
    )
    refuse(write_zip(tmp_path / "a.pt", v3, {"0": bytes(48)}), "without a dtype")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dict that holds itself
        b"\x80\x02)\x85h\x07.",  # what was never memoised
        b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",  # lists a hundred deep
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",  # a key nested 200,000 deep
        b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.",  # a member of a set, likewise
        b"\x80\x02" + b")" + b"\x85" * 200_000 + b"Q.",  # a persistent id, likewise
    ],
    ids=["list", "dict", "memo", "deep", "deep key", "deep member", "deep id"],
)
def test_cycles_and_depth(data, tmp_path):
    refuse(
        write_zip(tmp_path / "a.pt", data), "damaged pickle|nests dicts|does not hold any tensor"
    )


def test_shared_lists_do_not_multiply(tmp_path):
    # 30 lists, each of which holds the one before ten times: 10**30 paths
    data = b"\x80\x02]q\x00"
    for level in range(1, 30):
        data += b"](" + (b"h" + bytes([level - 1])) * 10 + b"eq" + bytes([level])
    refuse(write_zip(tmp_path / "a.pt", data + b"."), "holds over")


BOMBS = {
    "memo index": b"\x80\x02]r\xff\xff\xff\x7f.",
    "text length": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytes length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytearray length": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x.",
    "frame length": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"x.",
    "long length": b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.",
    "text copies": b"\x80\x02(X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"\x85q\x00"
    b"c_codecs\nencode\nq\x010" + b"h\x01h\x00R" * 20_000 + b"l.",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bomb", sorted(BOMBS))
@pytest.mark.parametrize("kind", ["zip", "legacy", "dcp"])
def test_memory_stays_bounded(kind, bomb, tmp_path):
    import tracemalloc

    data = BOMBS[bomb]
    write = {
        "zip": lambda: write_zip(tmp_path / "model.pt", data),
        "legacy": lambda: write_legacy(tmp_path / "model.pt", data),
        "dcp": lambda: write_metadata(tmp_path / "dcp", data),
    }[kind]
    path = write()
    tracemalloc.start()
    try:
        refuse(path, ".")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_bombs_do_not_need_address_space(tmp_path):
    """The same under a limit of the operating system, which tracemalloc cannot fool."""
    for name, data in BOMBS.items():
        write_zip(tmp_path / f"{name}.pt", data)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dmt_convert.checkpoint import open_checkpoint\n"
        "from dmt_convert.errors import CheckpointError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "for path in Path(sys.argv[1]).iterdir():\n"
        "    try: open_checkpoint(path)\n"
        "    except CheckpointError as error: assert 'MemoryError' not in str(error), error\n"
        "    else: raise AssertionError(path)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_repacked_and_mixed_archives(state, tmp_path):
    path = SAVES["torch"](state, tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refuse(packed, "is compressed")
    twice = tmp_path / "twice.pt"
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    refuse(twice, "2 records data.pkl")
    big = tmp_path / "big.pt"
    with zipfile.ZipFile(big, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    refuse(big, "big-endian")


def test_a_directory_entry_that_points_at_another_record(state, tmp_path):
    path = SAVES["torch"](state, tmp_path)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"model/data/{i}") for i in (3, 6))
    entry = raw.index(b"PK\x01\x02", archive.start_dir)
    while raw[entry + 46 :].split(b"PK")[0][: len(first.filename)] != first.filename.encode():
        entry = raw.index(b"PK\x01\x02", entry + 4)
    struct.pack_into("<I", raw, entry + 42, second.header_offset)
    path.write_bytes(raw)
    refuse(path, "has the header of another")


def test_dcp_metadata_that_lies(tmp_path):
    # an empty record in place of the metadata, and a plain value
    record = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81."
    refuse(write_metadata(tmp_path / "a", record), "does not describe a checkpoint")
    refuse(write_metadata(tmp_path / "b", b"\x80\x02K\x01."), "does not describe a checkpoint")


def test_a_file_that_shrinks_while_it_is_read(save, state, tmp_path):
    path = save(state, tmp_path)
    checkpoint = open_checkpoint(path)
    last = max(checkpoint.tensors, key=lambda t: t.pieces[0].offset)
    with last.pieces[0].path.open("r+b") as file:
        file.truncate(last.pieces[0].offset + 1)
    with pytest.raises(CheckpointError):
        b"".join(chunk.tobytes() for chunk in stream_tensor(last))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to(torch.float8_e4m3fn),
    ],
    ids=["complex", "float8"],
)
def test_tensors_of_other_types_are_not_called_code(tensor, tmp_path):
    torch.save({"x": tensor}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "holds a tensor of a type that is not read")
