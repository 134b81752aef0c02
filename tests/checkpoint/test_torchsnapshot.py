"""Directories of torchsnapshot: every kind of entry, JSON and YAML, damage and hostile payloads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint, read_tensor, stream_tensor
from dmt_convert.errors import CheckpointError
from support.checkpoints.torchsnapshot_files import Snapshot, raw_bytes


def whole(rows: int, cols: int) -> torch.Tensor:
    return torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols)


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


ROWS = [(0, 0, 4, 4, 0), (4, 0, 3, 4, 1)]
COLUMNS = [(0, 0, 5, 3, 0), (0, 3, 5, 3, 1)]
TENSORS = {
    "model.t_10": whole(7, 4),
    "model.t_2": whole(5, 6).to(torch.bfloat16),
    "model.a/b%": torch.ones(2),
    "model.w": whole(2, 3).half(),
    "model.saved": whole(3, 2),
    "model.chunked": whole(4, 4).to(torch.int8),
    "optimizer.state.t.sum": torch.tensor(3.0),
}


def write(folder: Path, *, batched: bool = False, **options: Any) -> Path:
    snapshot = Snapshot(folder, batched=batched)
    folder.mkdir(exist_ok=True)
    snapshot.keys("model", ["t_10", "t_2", "a/b%", "w", "saved", "chunked", "x", "epoch", "lr"])
    snapshot.replicated("model/w", TENSORS["model.w"])
    snapshot.sharded("model/t_10", TENSORS["model.t_10"], ROWS)
    snapshot.sharded("model/t_2", TENSORS["model.t_2"], COLUMNS)
    snapshot.dense("model/a%2Fb%25", TENSORS["model.a/b%"])
    snapshot.dense("model/saved", TENSORS["model.saved"], saved=True)
    snapshot.chunked("model/chunked", TENSORS["model.chunked"], [(0, 0, 1, 4, 0), (1, 0, 3, 4, 0)])
    snapshot.pickled("model/x", Evil(folder.parent / "it_ran"))
    snapshot.primitive("model/epoch", "int", "3")
    snapshot.primitive("model/lr", "float", "mpmZmZmZuT8=", "0.1")
    snapshot.keys("optimizer/state/t", ["sum"])
    snapshot.dense("optimizer/state/t/sum", TENSORS["optimizer.state.t.sum"])
    result: Path = snapshot.finish(**options)
    return result


@pytest.mark.parametrize("as_yaml", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_every_kind_of_entry(batched, as_yaml, tmp_path):
    folder = write(tmp_path / "s", batched=batched, as_yaml=as_yaml)
    for path in (folder, folder / ".snapshot_metadata"):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.source) == ("torchsnapshot", folder)
    found = {info.path: info for info in checkpoint.tensors}
    # in the order of the dicts that held them, not of the manifest
    assert [*found] == [*TENSORS]
    for name, tensor in TENSORS.items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(read_tensor(found[name]), wide.numpy())
        raw = b"".join(chunk.tobytes() for chunk in stream_tensor(found[name]))
        assert raw == raw_bytes(tensor)
    assert found["optimizer.state.t.sum"].container == ("optimizer", "state", "t")
    assert checkpoint.scalars == {"model.epoch": 3, "model.lr": "0.1"}
    assert checkpoint.unread == {"model.x": "a pickled object (Evil)"}
    assert not (tmp_path / "it_ran").exists()


def refuse(folder: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    assert caught.value.expected and caught.value.hint
    return caught.value


def change(folder: Path, key: str, **values: Any) -> None:
    """Overwrite fields of one entry, or of its first shard's tensor."""
    path = folder / ".snapshot_metadata"
    document = json.loads(path.read_text())
    entry = document["manifest"][key]
    (entry["shards"][0]["tensor"] if "shards" in entry else entry).update(values)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("key", "values", "match"),
    [
        ("0/model/w", {"location": "../w"}, "outside the directory"),
        ("0/model/w", {"location": "/etc/passwd"}, "outside the directory"),
        ("0/model/w", {"location": "replicated/no"}, "lacks 1 of its"),
        ("0/model/w", {"location": "loop"}, "loop: missing|payload files"),
        ("0/model/w", {"byte_range": [4, 8]}, "4 bytes for model.w"),
        ("0/model/w", {"byte_range": [100, 112]}, "lacks 1 of its"),
        ("0/model/w", {"byte_range": [8, 4]}, "bytes for model.w"),
        ("0/model/w", {"shape": [-2, -3]}, "a shape, an offset"),
        ("0/model/w", {"shape": [1 << 63]}, "a shape, an offset"),
        ("0/model/w", {"type": "other"}, "unknown kind"),
        ("0/model/t_10", {"shape": [3, 4], "byte_range": [0, 48]}, "sizes differ from its tensor"),
        ("0/model/t_10", {"dtype": "torch.int32"}, "in two dtypes"),
    ],
)
def test_metadata_that_lies(key, values, match, tmp_path):
    folder = write(tmp_path / "s")
    (folder / "loop").symlink_to("loop")
    change(folder, key, **values)
    refuse(folder, match)


def test_shards_that_leave_a_hole(tmp_path):
    folder = write(tmp_path / "s")
    path = folder / ".snapshot_metadata"
    document = json.loads(path.read_text())
    document["manifest"]["0/model/t_10"]["shards"] = []
    path.write_text(json.dumps(document))
    refuse(folder, "the 1 shards of model.t_10 hold 12 elements")


def test_other_serializers_are_left_unread(tmp_path):
    folder = write(tmp_path / "s")
    change(folder, "0/model/w", serializer="per_tensor_qtensor", dtype="torch.qint8")
    change(folder, "1/model/w", serializer="per_tensor_qtensor", dtype="torch.qint8")
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) == len(TENSORS) - 1
    assert checkpoint.unread["model.w"] == "a tensor in torch.qint8, written by per_tensor_qtensor"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"manifest": []}',
        '{"manifest": {"0/a": 3}}',
        '{"manifest": {"a": {"type": "list"}}}',
        "{" * 100_000,
        "[" * 100_000,
        "a: &a [1]\nmanifest: {<<: *a}",
        "manifest: !!python/object/apply:os.system ['touch it_ran']",
        "\x00",
    ],
    ids=range(11),
)
def test_damaged_metadata(text, tmp_path):
    (tmp_path / ".snapshot_metadata").write_text(text)
    refuse(tmp_path, "does not describe a snapshot|holds no tensor")


@pytest.mark.parametrize(("names", "ordered"), [("ba", True), ("ab", False)])
def test_sorted_tables_tell_no_order(names, ordered, tmp_path):
    """DMP sorts them, so that alphabetical order is no sign of the model's."""
    snapshot = Snapshot(tmp_path / "s")
    keys = [f"ebc.embedding_bags.{name}.weight" for name in names]
    snapshot.keys("model", keys)
    for key in keys:
        snapshot.sharded(f"model/{key}", torch.ones(2, 2), [(0, 0, 1, 2, 0), (1, 0, 1, 2, 1)])
    assert open_checkpoint(snapshot.finish()).ordered is ordered
