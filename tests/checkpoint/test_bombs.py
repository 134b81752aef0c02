"""Small files that would cost much: each is read or refused within seconds, in little memory."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.checkpoint.readers.documents import parse_protobuf_text
from dmt_convert.errors import CheckpointError, ConfigError, DmtError
from dmt_convert.families import read_model_config

MAX_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def little_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def write_zip(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", data)
    return path


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    assert "MemoryError" not in str(caught.value)
    assert len(str(caught.value)) < 100_000
    return caught.value


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def test_long_names_of_globals(tmp_path):
    """Every pair of two memoised texts is a name of its own."""
    begin = b"\x80\x04" + text(b"a" * 500_000) + b"\x94" + text(b"b") + b"\x94"
    names = b"".join(b"h\x00" + text(str(i).encode()) + b"\x930" for i in range(10_000))
    refuse(write_zip(tmp_path / "a.pt", begin + names + b"N."), "a global of 500001 characters")


LONG = b"\x80\x02" + text(b"k" * 1_000_000) + b"q\x000"


def nested(inside: bytes) -> bytes:
    return LONG + b"}h\x00" + inside + b"s."


def many(item: bytes, count: int) -> bytes:
    return b"}(" + b"".join(b"J" + struct.pack("<i", i) + item for i in range(count)) + b"u"


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89NtR"
)


@pytest.mark.parametrize(
    "inside",
    [many(b"K\x01", 100_000), many(b"cx\ny\n)R", 2000), many(TENSOR, 600)],
    ids=["scalars", "objects", "tensors"],
)
def test_a_long_key_around_many_values(inside, tmp_path):
    refuse(
        write_zip(tmp_path / "a.pt", nested(inside)), "characters in all|does not hold any|repeat"
    )


@pytest.mark.slow
def test_a_long_key_around_modules(tmp_path):
    parts = b"".join(text(part) + b"}s" for part in (b"_parameters", b"_buffers"))
    module = b"cm\nM\n)\x81}" + parts + text(b"_modules") + b"}"
    data = LONG + (module + b"h\x00") * 30 + module + b"sb" + b"ssb" * 30 + b"."
    with pytest.raises(CheckpointError):
        open_checkpoint(write_zip(tmp_path / "a.pt", data))


@pytest.mark.parametrize("kind", ["numbers", "tuples"])
def test_keys_that_collide(kind, tmp_path):
    prime = (1 << 61) - 1
    keys = [prime * i if kind == "numbers" else (prime * i,) for i in range(60_000)]
    content = {"w": torch.ones(2), "seen": 0}
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        data = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    items = b"".join(pickle.dumps(key, protocol=2)[2:-1] + b"K\x01" for key in keys)
    refuse(write_zip(path, data[:-1] + b"0}(" + items + b"u."), "does not hold any tensor")


def test_many_dots_in_the_names_of_a_header(tmp_path):
    name, prefix = "a" + "." * 3000, ["a", *[""] * 1500]
    metadata = {"dmt.dicts": json.dumps([prefix[:n] for n in range(1, 1500)])}
    path = tmp_path / "a.safetensors"
    save_file({f"{name}{i}": torch.ones(1) for i in range(500)}, path, metadata)
    refuse(path, "too long")
    save_file({"." * 5_000_000: torch.ones(1)}, path, {"dmt.dicts": '[["a"]]'})
    assert len(str(refuse(path, "a name of 5000000 characters"))) < 1000


def test_a_name_that_occurs_twice_in_a_header(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = f'{{"w": {entry % (0, 4)}, "w": {entry % (4, 8)}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refuse(path, "the name 'w' occurs twice")


ALIASES = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))


@pytest.mark.parametrize(
    "entry",
    [
        "{type: dict, keys: [*a12]}",
        "{type: object, obj_type: *a12, location: x, serializer: torch_save}",
        "{type: int, serialized_value: *a12}",
        "{type: str, serialized_value: x, readable: *a12}",
        "{type: *a12}",
        "{type: Tensor, dtype: *a12, serializer: x, shape: [1], location: x}",
        "{type: Tensor, dtype: torch.float32, serializer: buffer_protocol, shape: *a12}",
        "{type: Tensor, dtype: torch.float32, serializer: buffer_protocol, shape: [1],"
        " location: *a12}",
    ],
)
def test_aliases_of_yaml_are_never_written_out(entry, tmp_path):
    content = f"a0: &a0 [x, x]\n{ALIASES}version: 0.1.0\nmanifest:\n  0/model: {entry}\n"
    (tmp_path / ".snapshot_metadata").write_text(content)
    refuse(tmp_path, "does not describe a snapshot")


def test_numbers_of_thousands_of_digits(tmp_path):
    with pytest.raises(ValueError, match="a number of 5002 digits"):
        parse_protobuf_text("a: 0x" + "f" * 5000)
    path = tmp_path / "facts.yaml"
    for line in ("{}: 1", "self_pairs: {}", "features: [{{name: a, colour: {}}}]", "prefix: {}"):
        path.write_text(line.format("0x" + "f" * 5000))
        with pytest.raises(ConfigError) as caught:
            read_model_config(path)
        assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/proc/self"])
def test_a_model_config_that_is_no_file(device):
    with pytest.raises(ConfigError, match="is not a file"):
        read_model_config(Path(device))


def test_names_of_megabytes_are_cut_in_messages():
    error = DmtError("a" * 8_000_000, hint="look at " + "b" * 2000, details=["x " * 10_000_000])
    assert len(str(error)) < 50_000 and str(error).count("...") == 3
    assert DmtError("see /" + "p" * 300).found == "see /" + "p" * 300


def test_names_that_protobuf_escapes():
    message = parse_protobuf_text(
        r'name: "\347\224\250\346\210\267" name: "\xe7\x94\xa8" name: "\u7528" '
        r'''name: "a\n\"b\"" name: 'c' "d" name: "\0"'''
    )
    assert message["name"] == ["用户", "用", "用", 'a\n"b"', "cd", "\0"]
    for wrong in (r'"\347"', r'"\777"', r'"\ud800"'):
        with pytest.raises(ValueError, match=r"escape|decode|encode"):
            parse_protobuf_text(f"name: {wrong}")


def test_a_checksum_of_zero_was_not_computed(tmp_path):
    """`torch.serialization.skip_data` leaves records to be filled later, with checksum 0."""
    state = {"w": torch.arange(6.0), "v": torch.ones(2)}
    path = tmp_path / "a.pt"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        records = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
        for member in archive.infolist():
            if "/data/" in member.filename:
                member.CRC = 0
    found = {info.name: info for info in open_checkpoint(path).tensors}
    assert read_tensor(found["w"]).tolist() == state["w"].tolist()
    assert found["w"].pieces[0].crc32 is None
