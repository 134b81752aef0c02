"""Folders of several files: sharded safetensors with an index, DCP directories side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.errors import CheckpointError
from dmt_convert.families import infer_model
from support.checkpoints.containers import SAVES, save_indexed


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe that nobody writes to would be waited for."""
    for name in ("model.safetensors.index.json", "graph.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "a_dense_1.model").write_bytes(b"")
    refuse(tmp_path, "not a checkpoint of a known kind")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_with_an_index(kind, state, tmp_path):
    folder = save_indexed(state, tmp_path / "hf", kind)
    for path in (folder, *folder.iterdir()):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.ordered) == ("indexed", False)
        assert len(checkpoint.files) == 3
        assert checkpoint.scalars == {"total_size": 7}
        assert {i.name: read_tensor(i).tolist() for i in checkpoint.tensors} == {
            name: tensor.tolist() for name, tensor in state.items()
        }
    assert infer_model(checkpoint).spec.family == "facebook-dlrm"


def test_a_folder_with_one_file(state, tmp_path):
    SAVES["safetensors"](state, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.source.name) == ("safetensors", "model.safetensors")
    assert len(checkpoint.tensors) == len(state)


def test_shards_and_index_must_fit(state, tmp_path):
    folder = save_indexed(state, tmp_path / "hf")
    index, (first, second) = folder / "model.safetensors.index.json", sorted(folder.glob("*of*"))
    text = index.read_text()
    moved = json.loads(text)
    moved["weight_map"]["bot_l.0.bias"] = first.name
    index.write_text(json.dumps(moved))
    details = refuse(folder, "contradict each other in 2 tensors").details
    assert f"{first.name}: lacks bot_l.0.bias" in details
    for name in ("../a.safetensors", "", "/etc/passwd"):
        moved["weight_map"]["bot_l.0.bias"] = name
        index.write_text(json.dumps(moved))
        refuse(folder, "a shard outside the folder")
    for wrong in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 99_999):
        index.write_text(wrong)
        refuse(index, "not an index of shards|is empty")
    index.write_text(text)
    second.unlink()
    assert refuse(first, "lacks 1 of the 2 shards").details == (second.name,)


def test_dcp_directories_side_by_side(state, tmp_path):
    out = tmp_path / "step-3"
    for name, content in (
        ("model", state),
        ("optimizer", {"state": {"w": {"sum": state["bot_l.0.weight"]}}}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        out.mkdir(exist_ok=True)
        SAVES["dcp"](content, folder).rename(out / name)
    checkpoint = open_checkpoint(out)
    assert checkpoint.format == "dcp-pair" and len(checkpoint.files) == 4
    found = {info.path: info for info in checkpoint.tensors}
    assert {*found} == {"optimizer.state.w.sum", *(f"model.{name}" for name in state)}
    np.testing.assert_array_equal(
        read_tensor(found["model.emb_l.2.weight"]), state["emb_l.2.weight"].numpy()
    )
    assert len(infer_model(checkpoint).tensors) == len(state)
    assert open_checkpoint(out / "model").format == "dcp"
    (out / "optimizer" / "__0_0.distcp").unlink()
    refuse(out, "optimizer lacks 1 of its 1 payload files")
