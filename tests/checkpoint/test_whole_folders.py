"""Folders that hold one checkpoint, or several, or what DeepSpeed and careless copies leave."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.errors import ArchitectureError, CheckpointError
from dmt_convert.families import ModelConfig, infer_model
from support.checkpoints.containers import (
    SAVES,
    Save,
    save_dcp,
    save_indexed,
    save_safetensors,
    save_torch,
    tiny_state,
)
from support.checkpoints.torchsnapshot_files import Snapshot
from support.originals import difference, flat_logits, torchrec_original


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def test_a_folder_with_one_checkpoint_is_opened(save: Save, tmp_path):
    path = save(tiny_state(), tmp_path)
    (tmp_path / "readme.txt").write_text("how it was trained")
    torch.save({"lr": torch.ones(1)}, tmp_path / "optimizer.pt")
    (tmp_path / "logs").mkdir()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source == path and len(checkpoint.tensors) == len(tiny_state())


def test_a_folder_with_several_names_them(tmp_path):
    save_torch(tiny_state(), tmp_path)
    save_dcp(tiny_state(), tmp_path)
    error = refuse(tmp_path, "holds several checkpoints")
    assert str(tmp_path / "dcp") in error.hint and str(tmp_path / "model.pt") in error.hint


def test_what_lies_deeper_is_named(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = save_torch(tiny_state(), tmp_path / "a" / "b")
    assert str(tmp_path / "a" / "b") not in refuse(tmp_path, "is a directory").hint
    path.rename(tmp_path / "a" / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.tensors
    assert str(tmp_path / "a" / "model.pt") in refuse(tmp_path, "is a directory").hint


def test_sparse_and_dense_parts_in_two_dicts_or_files(tmp_path):
    original = torchrec_original("dcn")
    state = original.state
    sparse = {name: value for name, value in state.items() if name.startswith("sparse_arch.")}
    dense = {name: value for name, value in state.items() if name not in sparse}
    (tmp_path / "files").mkdir()
    torch.save(sparse, tmp_path / "files" / "sparse.pt")
    torch.save(dense, tmp_path / "files" / "dense.pt")
    torch.save({"sparse": sparse, "dense": dense, "epoch": 3}, tmp_path / "dicts.pt")
    modules = {name.partition(".")[0] for name in state}
    torch.save(
        {
            module: {n.partition(".")[2]: v for n, v in state.items() if n.startswith(module)}
            for module in modules
        },
        tmp_path / "modules.pt",
    )
    for name in ("files", "dicts.pt", "modules.pt"):
        info = infer_model(open_checkpoint(tmp_path / name))
        assert difference(flat_logits(info, original.batch)[1], original.logits) <= 1e-6
    # of two versions of the dense part, nobody can say which one is meant
    torch.save(dense, tmp_path / "files" / "dense_old.pt")
    error = refuse(tmp_path / "files", "holds several checkpoints")
    assert "into a folder of their own" in error.hint


@pytest.mark.parametrize("kind", [*SAVES, "indexed", "snapshot"])
def test_links_into_a_store_of_blobs(kind, tmp_path):
    """The layout of Hugging Face's cache, of DVC and of datalad."""
    state = tiny_state()
    folder = tmp_path / "saved"
    folder.mkdir()
    if kind == "indexed":
        save_indexed(state, folder)
    elif kind == "snapshot":
        snapshot = Snapshot(folder, batched=False)
        snapshot.keys("model", list(state))
        for name, tensor in state.items():
            snapshot.dense(f"model/{name}", tensor)
        snapshot.finish()
    else:
        SAVES[kind](state, folder)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    found = {info.name: info for info in open_checkpoint(folder).tensors}
    assert {*found} == {*state}
    for name, tensor in state.items():
        assert read_tensor(found[name]).tolist() == tensor.tolist()


@pytest.mark.parametrize("target", ["/dev/zero", "nothing"])
def test_a_link_to_what_is_no_file_is_refused(target, tmp_path):
    folder = save_dcp(tiny_state(), tmp_path)
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to(target)
    refuse(folder, "lacks 1 of its 1 payload files|is not a regular file")


def test_a_folder_of_deepspeed_points_at_the_weights(tmp_path):
    step = tmp_path / "global_step100"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step100")
    weights = step / "mp_rank_00_model_states.pt"
    torch.save({"module": tiny_state(), "dp_world_size": 2}, weights)
    for rank in range(2):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"x": torch.ones(3)}}, step / name)
    for folder in (tmp_path, step):
        assert refuse(folder, "DeepSpeed").hint.endswith(str(weights))
    assert len(open_checkpoint(weights).tensors) == len(tiny_state())
    weights.unlink()
    for rank in range(2):  # stage 3
        torch.save({"module": {}}, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    for path in (tmp_path, step, step / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert "zero_to_fp32.py" in refuse(path, "DeepSpeed").hint


@pytest.mark.parametrize("batched", [False, True])
def test_a_snapshot_copied_without_its_hidden_file(batched, tmp_path):
    state = tiny_state()
    snapshot = Snapshot(tmp_path / "s", batched=batched)
    snapshot.keys("model", list(state))
    for name, tensor in state.items():
        snapshot.dense(f"model/{name}", tensor)
    folder = snapshot.finish()
    (folder / ".snapshot_metadata").unlink()
    error = refuse(folder, r"without its \.snapshot_metadata")
    assert "hidden" in error.hint


def test_a_dcp_directory_copied_without_its_hidden_file(tmp_path):
    folder = save_dcp(tiny_state(), tmp_path)
    (folder / ".metadata").unlink()
    assert "hidden" in refuse(folder, r"no \.metadata").hint


def test_flat_parameters_of_fsdp_are_no_model(tmp_path):
    for name in ("_flat_param", "model._fsdp_wrapped_module._flat_param"):
        torch.save({name: torch.ones(9)}, tmp_path / "rank.pt")
        assert "FULL_STATE_DICT" in refuse(tmp_path / "rank.pt", "flat parameters").hint


def test_averaged_weights_of_torcheasyrec_are_asked_about(shared, tmp_path):
    """Its own evaluation and export use them, if training kept any."""
    folder = tmp_path / "tz"
    shutil.copytree(shared / "checkpoints" / "tzrec-dlrm", folder)
    dense = {
        info.name: torch.from_numpy(read_tensor(info)) * 1.5
        for info in open_checkpoint(folder).tensors
        if info.container == ("model",) and "embedding" not in info.name
    }
    (tmp_path / "ema").mkdir()
    save_dcp(dense, tmp_path / "ema").rename(next(folder.glob("model.ckpt-*")) / "dense_ema")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ArchitectureError, match="holds 2 models"):
        infer_model(checkpoint)
    chosen = infer_model(checkpoint, ModelConfig(container="dense_ema"))
    assert chosen.tensors
    model = {t.name: t for t in checkpoint.tensors if t.container == ("model",)}
    averaged = {t.name: t for t in checkpoint.tensors if t.container == ("dense_ema",)}
    assert {*model} == {*averaged}
    for name, tensor in dense.items():
        assert read_tensor(averaged[name]).tolist() == tensor.tolist()


def test_safetensors_of_tied_tensors(tmp_path):
    from safetensors.torch import save_model
    from torch import nn

    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Embedding(5, 4), "c": nn.Linear(4, 1)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    found = {t.name: read_tensor(t).tolist() for t in open_checkpoint(tmp_path).tensors}
    assert found == {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def test_other_dtypes_beside_are_named_and_not_damage(tmp_path):
    others = {
        "count": torch.ones(2, dtype=torch.uint64),
        "fp8": torch.ones(3, 4).to(torch.float8_e4m3fn),
        "c": torch.ones(5, dtype=torch.complex64),
    }
    save_safetensors(tiny_state() | others, tmp_path)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert len(checkpoint.tensors) == len(tiny_state())
    assert checkpoint.unread == {
        "count": "a tensor of shape [2] in U64",
        "fp8": "a tensor of shape [3, 4] in F8_E4M3",
        "c": "a tensor of shape [5] in C64",
    }
    path = tmp_path / "only.safetensors"
    from safetensors.torch import save_file

    save_file(others, path)
    assert len(refuse(path, "does not hold any tensor that can be read").details) == 3
