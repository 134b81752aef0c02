"""What is no checkpoint is called what it is, and the next command is given."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.errors import CheckpointError
from support.checkpoints.containers import save_indexed, save_torch, tiny_state

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refuse(path: str | Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def tar(raw: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("model.pt")
        member.size = len(raw)
        archive.addfile(member, io.BytesIO(raw))
    return made.getvalue()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "weights", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (gzip.compress(b"x" * 99, mtime=0), "compressed with gzip", "gunzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed with zstd", "zstd -d"),
        (b"\xfd7zXZ\x00" + bytes(99), "compressed with xz", "unxz"),
        (tar(b"x" * 99), "tar archive", "tar -xf"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5", "state_dict"),
        (LFS, "pointer of git-lfs", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "web page", "download"),
        (b'<?xml version="1.0"?><Error>NoSuchKey</Error>', "XML document", "download"),
        (b'{"error": "Repository Not Found"}', "JSON document", "download"),
        (bytes(4096), "zeros", "copy it again"),
    ],
)
def test_other_files(content, what, hint, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert hint in refuse(tmp_path / name, what).hint


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pointers_of_git_lfs_in_a_folder(kind, tmp_path):
    """What `git clone` leaves without git-lfs."""
    folder = save_indexed(tiny_state(), tmp_path / "hf", kind)
    for path in folder.glob("*-of-*"):
        path.write_bytes(LFS)
    assert "git lfs pull" in refuse(folder, "pointer of git-lfs").hint


def packaged(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.package import PackageExporter

        with PackageExporter(path) as exporter:
            exporter.extern("torch.**")
            exporter.save_pickle("model", "model.pkl", nn.Linear(2, 1))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 1), (torch.ones(1, 2),)), path)


def frozen(path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(nn.Linear(2, 1).eval())), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/model.pt", save_torch(tiny_state(), path.parent).read_bytes())


@pytest.mark.parametrize(
    ("write", "what", "hint"),
    [
        (packaged, "torch.package", "PackageImporter"),
        (exported, "exported program", "torch.export.load"),
        (zipped, "zip archive of other files", "unzip"),
        (frozen, "scripted module without weights", "freeze"),
        (lambda path: np.savez(path.open("wb"), w=np.ones(3)), "numpy arrays", "torch.save"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_archives(write, what, hint, tmp_path):
    write(tmp_path / "thing.zip")
    assert hint in refuse(tmp_path / "thing.zip", what).hint


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("s3://bucket/run/model.pt", "aws s3 cp s3://bucket/run/model.pt"),
        ("gs://bucket/run", "gcloud storage cp --recursive gs://bucket/run"),
        ("hf://owner/model", "hf download owner/model"),
        ("https://example.com/model.pt", "curl -L -O https://example.com/model.pt"),
        ("abfs://container/model.pt", "copy"),
    ],
)
def test_remote_paths(url, hint):
    for path in (url, Path(url)):
        error = refuse(path, "remote paths are not read")
        assert hint in error.hint and url in error.found


def test_a_folder_whose_name_looks_like_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    save_torch(tiny_state(), Path("s3:"))
    assert open_checkpoint("s3:/model.pt").tensors


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert "cat" in refuse(tmp_path / "pipe.pt", "is a pipe").hint
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        refuse(tmp_path / "socket", "is a socket")
    refuse("/dev/zero", "is a device")


def test_arrays_of_numpy_are_named(tmp_path):
    arrays = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float64)}
    for protocol in (2, 4, 5):
        torch.save(arrays, tmp_path / "a.pt", pickle_protocol=protocol)
        error = refuse(tmp_path / "a.pt", "does not hold any tensor that can be read, but 2 other")
        assert "from_numpy" in error.hint
        assert error.details[0] == "w: a numpy array of shape [2, 3] in f4"


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_types_are_named(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
    others = {
        "fp8": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "u16": torch.ones(4, dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "quantised": quantised,
    }
    torch.save(others | {"w": torch.ones(2)}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
    assert {name: what for name, what in checkpoint.unread.items() if name in others} == {
        "fp8": "a tensor of shape [2, 3] in float8_e4m3fn",
        "u16": "a tensor of shape [4] in uint16",
        "complex": "a tensor of shape [2] in ComplexFloatStorage",
        "sparse": "a sparse tensor",
        "meta": "a tensor on the device `meta`, which was saved without its values",
        "quantised": "a tensor of shape [2, 3] in QInt8Storage",
    }
