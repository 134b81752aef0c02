"""What torch, safetensors and DCP write is read back to the bit, without torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import (
    FlatCheckpoint,
    TensorInfo,
    gather_rows,
    open_checkpoint,
    read_tensor,
    stream_tensor,
)
from support.checkpoints.containers import SAVES
from support.cluster import sharded_dcp
from support.cluster.client import serve_ranks


def by_path(checkpoint: FlatCheckpoint) -> dict[str, TensorInfo]:
    return {info.path: info for info in checkpoint.tensors}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(info: TensorInfo, tensor: torch.Tensor) -> None:
    """Compare shape, bytes, values and, for tables, rows picked out of order."""
    assert info.shape == tuple(tensor.shape)
    assert b"".join(chunk.tobytes() for chunk in stream_tensor(info)) == bits(tensor)
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    np.testing.assert_array_equal(read_tensor(info), wide.detach().numpy())
    if tensor.ndim == 2 and tensor.is_floating_point() and len(tensor):
        rows = np.array([len(tensor) - 1, 0], dtype=np.int64)
        np.testing.assert_array_equal(
            gather_rows(info, rows), tensor.detach()[rows].float().numpy()
        )


def test_every_container_gives_the_tensors_back(save, state, tmp_path):
    checkpoint = open_checkpoint(save(state, tmp_path))
    infos = by_path(checkpoint)
    assert set(infos) == set(state)
    for name, tensor in state.items():
        assert_same(infos[name], tensor)
    assert checkpoint.nbytes >= sum(t.nbytes for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes(save, dtype, tmp_path):
    tensors = {"a.weight": (torch.arange(12).reshape(3, 4) * 3).to(dtype), "b": torch.ones(2, 2)}
    infos = by_path(open_checkpoint(save(tensors, tmp_path)))
    for name, tensor in tensors.items():
        assert_same(infos[name], tensor)


def test_only_torch_files_keep_the_order(state, tmp_path):
    ordered = {name: open_checkpoint(save(state, tmp_path)).ordered for name, save in SAVES.items()}
    assert ordered == {"torch": True, "legacy": True, "safetensors": False, "dcp": False}


@pytest.mark.parametrize("kind", ["torch", "legacy", "dcp"])
def test_nested_dicts_keep_their_keys(kind, state, tmp_path):
    content = {"run": {"model": state}, "optimizer": {"state": {0: {"sum": torch.ones(5, 4)}}}}
    infos = by_path(open_checkpoint(SAVES[kind](content, tmp_path)))
    assert infos["run.model.bot_l.0.bias"].container == ("run", "model")
    assert infos["run.model.bot_l.0.bias"].name == "bot_l.0.bias"
    assert infos["optimizer.state.0.sum"].container == ("optimizer", "state", "0")
    assert_same(infos["run.model.emb_l.0.weight"], state["emb_l.0.weight"])


@pytest.mark.parametrize("kind", ["torch", "legacy", "dcp"])
def test_views_and_shared_storages(kind, tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    content = {
        "base": base,
        "rows": base[2:4],
        "columns": base[:, 3:7],
        "transposed": base.t(),
        "expanded": torch.arange(4.0).expand(3, 4),
        "stepped": base[::2, ::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    infos = by_path(open_checkpoint(SAVES[kind](content, tmp_path)))
    for name, tensor in content.items():
        assert_same(infos[name], tensor)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_with_attributes_is_read(legacy, tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    tensor.origin = "somewhere"  # type: ignore[attr-defined]
    path = tmp_path / "model.pt"
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=not legacy)
    (info,) = open_checkpoint(path).tensors
    assert_same(info, tensor)


def test_checksums_may_be_switched_off(state, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for info in open_checkpoint(tmp_path / "model.pt").tensors:
        assert_same(info, state[info.name])


@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainers_store_beside_the_weights(legacy, state, tmp_path):
    counts: defaultdict[str, int] = defaultdict(int, a=1)
    content: dict[str, Any] = {
        "state_dict": OrderedDict(state),
        "test_acc": np.float64(78.5),
        "train_loss": np.float32(0.5),
        "iter": np.int64(7),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], out=Path("x")),
        "names": {"b", "a"},
        "counts": counts,
        "curve": np.arange(1000.0),
        "random": torch.get_rng_state(),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "sparse": torch.eye(3).to_sparse(),
        "none": None,
        3: "three",
    }
    path = tmp_path / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert by_path(checkpoint)["state_dict.emb_l.2.weight"].shape == (9, 4)
    assert checkpoint.scalars["test_acc"] == 78.5
    assert checkpoint.scalars["train_loss"] == 0.5
    assert checkpoint.scalars["iter"] == 7
    assert checkpoint.scalars["3"] == "three"
    assert checkpoint.scalars["none"] is None


def test_numpy_1_scalars(state, tmp_path):
    # numpy 1 called the module numpy.core; "numpy._core" in a legacy file is patched in place
    path = tmp_path / "model.pt"
    torch.save(
        {"test_acc": np.float64(0.25), "state_dict": state},
        path,
        _use_new_zipfile_serialization=False,
    )
    raw = path.read_bytes()
    assert raw.count(b"cnumpy._core.multiarray\n") == 1
    path.write_bytes(raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.scalars["test_acc"] == 0.25
    for info in checkpoint.tensors:
        assert_same(info, state[info.name])


@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_were_saved_on_a_gpu(legacy, state, tmp_path, monkeypatch):
    # as on a machine with two of them: every storage is tagged with where it was
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    assert b"cuda:1" in path.read_bytes()
    for info in open_checkpoint(path).tensors:
        assert_same(info, state[info.name])


@pytest.mark.slow
def test_shards_of_two_ranks_are_joined(tmp_path):
    out, expected = tmp_path / "dcp", sharded_dcp.full_state()
    with serve_ranks("sharded_dcp") as run:
        run(2, "save", folder=out)
    checkpoint = open_checkpoint(out)
    infos = by_path(checkpoint)
    assert set(infos) == {f"model.{name}" for name in expected}
    assert len(infos["model.rows"].pieces) == len(infos["model.columns"].pieces) == 2
    for name, tensor in expected.items():
        assert_same(infos[f"model.{name}"], tensor)
    assert open_checkpoint(out / ".metadata").source == out
    (out / "__1_0.distcp").rename(tmp_path / "elsewhere")
    with pytest.raises(Exception, match=r"__1_0\.distcp: missing"):
        open_checkpoint(out)


def test_a_dcp_folder_is_found_by_any_of_its_files(state, tmp_path):
    folder = SAVES["dcp"](state, tmp_path)
    assert open_checkpoint(folder / "__0_0.distcp").source == folder
    assert open_checkpoint(folder / ".metadata").format == "dcp"


def test_hundreds_of_tables_open_fast(save, tmp_path):
    import time

    tables = {f"emb_l.{i}.weight": torch.zeros(2, 4) for i in range(600)}
    path = save(tables, tmp_path)
    begin = time.process_time()  # not the clock: other processes may be busy
    assert len(open_checkpoint(path).tensors) == 600
    assert time.process_time() - begin < 5


def test_no_torch_is_imported(state, tmp_path):
    paths = [str(save(state, tmp_path)) for save in SAVES.values()]
    code = (
        "import sys; from pathlib import Path\n"
        "from dmt_convert.families import infer_model\n"
        "from dmt_convert.checkpoint import open_checkpoint\n"
        "for path in sys.argv[1:]: assert len(infer_model(open_checkpoint(Path(path)))"
        ".spec.tables) == 3\n"
        "assert not {'torch', 'safetensors', 'torchrec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=60)
