"""`dmt unshard`: every container's tensors in one file, to the bit, under the trainer's names."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmt_convert.checkpoint import gather_rows, open_checkpoint
from dmt_convert.errors import CheckpointError, ConfigError, ExportError
from dmt_convert.files.unshard import unshard_checkpoint
from support.checkpoints.flat import make_sparse_flat

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    return {
        "emb.b.weight": torch.arange(12.0).reshape(4, 3),
        "emb.a.weight": torch.arange(10).reshape(5, 2).to(torch.uint8),
        "over.weight": torch.full((1, 3), torch.nan),
        "over.bias": torch.ones(1, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def nested(state: State) -> dict[str, Any]:
    momentum = {name: {"sum": tensor.float() + 1} for name, tensor in state.items()}
    return {"epoch": 3, "optimizer": {"state": momentum, "fn": os.path.join}, "model": state}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.nan_to_num(9), b.nan_to_num(9)
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_names_and_bytes_are_the_trainers(nested: dict[str, Any], tmp_path: Path) -> None:
    torch.save(nested, tmp_path / "ckpt.pt")
    out = tmp_path / "model.safetensors"
    done = unshard_checkpoint(tmp_path / "ckpt.pt", out)
    written = load_file(out)
    state = nested["model"]
    assert {name for name in written if not name.startswith("optimizer.")} == set(state)
    for name, tensor in state.items():
        assert same(written[name], tensor)
        assert same(written[f"optimizer.state.{name}.sum"], tensor.float() + 1)
    assert done.scalars == 1
    assert done.unread == {"optimizer.fn": "the name posixpath.join"}
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert oct(out.stat().st_mode)[-3:] == "644"
    assert leftovers(tmp_path) == []


def test_what_was_written_opens_as_what_was_read(nested: dict[str, Any], tmp_path: Path) -> None:
    torch.save(nested, tmp_path / "ckpt.pt")
    unshard_checkpoint(tmp_path / "ckpt.pt", tmp_path / "a.safetensors")
    found = {info.path: info for info in open_checkpoint(tmp_path / "a.safetensors").tensors}
    # the optimizer's tensors are in their dicts again, so that they are not taken for the model's
    assert found["optimizer.state.over.bias.sum"].container == ("optimizer", "state", "over.bias")
    assert found["over.bias"].container == ()


def test_dicts_of_equal_names_keep_their_keys(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "ema": state}, tmp_path / "ckpt.pt")
    done = unshard_checkpoint(tmp_path / "ckpt.pt", tmp_path / "a.safetensors")
    names = {tensor.name for tensor in done.tensors}
    assert names == {*state, *(f"ema.{name}" for name in state)}


def test_only_what_is_asked_for(nested: dict[str, Any], tmp_path: Path) -> None:
    torch.save(nested, tmp_path / "ckpt.pt")
    out = tmp_path / "a.safetensors"
    done = unshard_checkpoint(tmp_path / "ckpt.pt", out, only=["emb.*", "model.steps"])
    assert set(load_file(out)) == {"emb.a.weight", "emb.b.weight", "steps"}
    assert len(done.passed_over) == 7
    with pytest.raises(ConfigError, match=r"no tensor of .* matches x"):
        unshard_checkpoint(tmp_path / "ckpt.pt", tmp_path / "b.safetensors", only=["x"])


def test_names_that_cannot_be_told_apart(tmp_path: Path) -> None:
    one = torch.ones(1)
    content = {"a": {"b.c": one}, "a.b": {"c": one}, "model": {"x": one, "y": one}}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="1 names of tensors are not unique") as caught:
        unshard_checkpoint(tmp_path / "ckpt.pt", tmp_path / "a.safetensors")
    assert "--only" in caught.value.hint  # which helps:
    done = unshard_checkpoint(tmp_path / "ckpt.pt", tmp_path / "a.safetensors", only=["model.*"])
    assert len(done.tensors) == 2


def test_targets_that_are_taken(state: State, tmp_path: Path) -> None:
    source = tmp_path / "ckpt.pt"
    torch.save(state, source)
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    (tmp_path / "link").symlink_to(out)
    for target, says in (
        (out, "exists"),
        (tmp_path, "is a folder"),
        (tmp_path / "link", "is a symbolic link"),
        (source, "is a file of the checkpoint itself"),
        (tmp_path / "no" / "a", "does not exist"),
    ):
        with pytest.raises(ExportError, match=says) as caught:
            unshard_checkpoint(source, target, force=says != "exists")
        assert caught.value.expected and caught.value.hint
    assert out.read_text() == "mine"
    unshard_checkpoint(source, out, force=True)
    assert set(load_file(out)) == set(state)


def test_a_target_that_appears_meanwhile(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "a.safetensors"

    def appear(step: str, done: int, total: int) -> None:
        out.write_text("theirs")

    with pytest.raises(ExportError, match="exists"):
        unshard_checkpoint(tmp_path / "ckpt.pt", out, progress=appear)
    assert out.read_text() == "theirs"
    assert leftovers(tmp_path) == []


def test_changed_bytes_are_refused(state: State, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(state, path)
    raw = bytearray(path.read_bytes())
    at = raw.index(torch.arange(12.0).numpy().tobytes())
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="has the checksum"):
        unshard_checkpoint(path, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmt_convert.cli.main", "unshard", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("kind", ["full", "killed"])
def test_nothing_half_written_stays(kind: str, tmp_path: Path) -> None:
    source = make_sparse_flat(tmp_path / "big.safetensors", rows=[200_000, 200_000])
    with source.open("r+b") as file:  # no hole, so that bytes are written
        file.seek(60 << 20)
        file.write(b"\x01" * (16 << 20))
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dmt_convert.files.unshard import unshard_checkpoint\n"
        "def stop(step, done, total):\n"
        "    if done > total // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "unshard_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), progress=stop)\n"
    )
    out = tmp_path / "a.safetensors"
    if kind == "full":
        limit = 20 << 20
        done = run(
            source,
            "--out",
            out,
            "--json",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 3, done.stderr
        assert "is full" in json.loads(done.stdout)["found"]
        assert leftovers(tmp_path) == []
    else:
        command = [sys.executable, "-c", code, str(source), str(out)]
        assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
        assert len(leftovers(tmp_path)) == 1
        unshard_checkpoint(source, out, only=["over_arch*"])
        assert leftovers(tmp_path) == []
    assert out.exists() is (kind == "killed")


def test_memory_stays_small(tmp_path: Path) -> None:
    source = make_sparse_flat(tmp_path / "big.safetensors", rows=[4_000_000, 4_000_000])
    code = (
        "import sys; from pathlib import Path\n"
        "from dmt_convert.files.unshard import unshard_checkpoint\n"
        "done = unshard_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert done.nbytes > 2 * 10**9\n"
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "peak = next(line.split()[1] for line in status if line.startswith('VmHWM'))\n"
        "assert int(peak) < 250 << 10, peak\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "a.safetensors")]
    subprocess.run(command, check=True, timeout=60)
    written = tmp_path / "a.safetensors"
    assert written.stat().st_blocks * 512 < 64 << 20  # holes stay holes


def test_the_command(state: State, tmp_path: Path, call_dmt: Callable[..., Any]) -> None:
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "a.safetensors"
    done = call_dmt("unshard", tmp_path / "ckpt.pt", "--out", out, "--only", "emb*", "--json")
    assert done.code == 0
    value = json.loads(done.stdout)
    assert value["tensors"]["emb.a.weight"] == {"dtype": "uint8", "shape": [5, 2]}
    assert value["left_out"]["tensors"] == ["over.weight", "over.bias", "steps"]
    again = call_dmt("unshard", tmp_path / "ckpt.pt", "--out", out)
    assert again.code == 3 and "exists" in again.stderr
    shown = call_dmt("unshard", tmp_path / "ckpt.pt", "--out", out, "--force").stdout
    assert "5 tensors" in shown


@pytest.mark.parametrize(
    "sample",
    [
        "torchrec-dcn-dmp-2rank-pt/dmp_rank0.pt",
        "torchrec-dcn-torchsnapshot-2rank/snapshot",
        "torchrec-dcn-pickled-module/model.pt",
        "torchrec-dcn-dcp-2rank/dcp",
        "fb-dlrm-dot/model.pt",
        "tzrec-dlrm/model.ckpt-585",
    ],
)
def test_samples(sample: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "checkpoints" / sample
    if not source.exists():
        pytest.skip(f"no sample {sample}")
    out = tmp_path / "a.safetensors"
    done = unshard_checkpoint(source, out)
    read = {info.path: info for info in open_checkpoint(source).tensors}
    written = load_file(out)
    assert len(written) == len(read) == len(done.tensors)
    tables = [name for name in read if "embedding_bags" in name or "emb_l" in name]
    assert tables
    for path in tables:
        if len(read[path].shape) == 2:
            name = path if path in written else read[path].name
            rows = np.arange(read[path].shape[0])
            np.testing.assert_array_equal(written[name].float(), gather_rows(read[path], rows))
