"""Pickled modules and Lightning's checkpoints: state is read, objects stay inert, nothing runs."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import FlatCheckpoint, open_checkpoint, read_tensor
from dmt_convert.checkpoint.inert import content
from dmt_convert.errors import CheckpointError
from dmt_convert.families import infer_model


def values(checkpoint: FlatCheckpoint) -> dict[str, np.ndarray]:
    return {info.path: read_tensor(info) for info in checkpoint.tensors}


def assert_state(checkpoint: FlatCheckpoint, module: nn.Module, prefix: str = "") -> None:
    """The tensors of a module, in order, to the bit."""
    found = {k: v for k, v in values(checkpoint).items() if k.startswith(prefix)}
    expected = {prefix + k: v.detach().numpy() for k, v in module.state_dict().items()}
    assert [*found] == [*expected]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def trainer():
    """A module of a package that is there while the file is written, and gone when it is read."""
    package = types.ModuleType("some_trainer")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeta = nn.ModuleDict({"t1": nn.EmbeddingBag(5, 4), "t0": nn.EmbeddingBag(3, 4)})
            self.alpha = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
            self.kernels = nn.ParameterList([nn.Parameter(torch.ones(2)), torch.zeros(1)])
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("kept", torch.arange(3))
            self.register_buffer("dropped", torch.arange(3), persistent=False)
            self.register_buffer("none", None)
            self.embedding_dim = 4
            self.alpha[0].owner = [self]  # a cycle outside _modules

    Model.__module__ = "some_trainer"
    Model.__qualname__ = "Model"
    package.Model = Model  # type: ignore[attr-defined]
    sys.modules["some_trainer"] = package
    yield Model
    del sys.modules["some_trainer"]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "protocol 4", "legacy"],
)
def test_a_pickled_module_is_its_state_dict(options, trainer, tmp_path):
    model = trainer()
    torch.save(model, tmp_path / "model.pt", **options)
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert checkpoint.ordered
    assert_state(checkpoint, model)
    assert checkpoint.scalars["embedding_dim"] == 4
    assert checkpoint.scalars["alpha.0.in_features"] == 2


def test_modules_inside_dicts(trainer, tmp_path):
    model = trainer()
    run = types.SimpleNamespace(best=model.scale, last=model.scale)
    content = {"net": model, "epoch": 3, "run": run, "fn": os.path.join}
    torch.save(content, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert_state(checkpoint, model, "net.")
    assert {info.container for info in checkpoint.tensors if info.path.startswith("net.")} == {
        ("net",)
    }
    assert checkpoint.scalars["epoch"] == 3
    assert checkpoint.unread["run"] == "an object made by types.SimpleNamespace"
    assert values(checkpoint)["run.last"] == 2  # tensors that objects hold are found too
    assert checkpoint.unread["fn"] == "the name posixpath.join"


# TorchScript is deprecated: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    torch.jit.save(torch.jit.trace(model, torch.ones(1, 2)), tmp_path / "model.pt")
    assert_state(open_checkpoint(tmp_path / "model.pt"), model)


@pytest.mark.parametrize(
    "fields",
    [
        b"X\x08\x00\x00\x00_modulesK\x01s",
        b"".join(
            b"X" + bytes([len(part), 0, 0, 0]) + part + b"}s"
            for part in (b"_parameters", b"_buffers", b"_modules")
        )
        + pickle.dumps(10**5000, protocol=2)[2:-1]
        + b"K\x01s",
    ],
    ids=["scripted, without its parts", "a number for a name"],
)
def test_damaged_modules(fields, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02c__torch__\nM\n)\x81}" + fields + b"b.")
    with pytest.raises(CheckpointError, match=r"scripted module .*__torch__\.M"):
        open_checkpoint(tmp_path / "model.pt")


class Callback:
    """Stands for what Lightning's users keep in their checkpoints."""

    def __init__(self, *args: Any) -> None:
        self.best, self.tensor = args, torch.ones(2)


class AttributeDict(dict[str, Any]):
    """As Lightning's hyper_parameters: a dict of a class of its own."""


def test_lightning(state, tmp_path):
    content = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": Callback(1, "x")},
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(lr=0.1, layers=[1, 2], loss=nn.BCELoss(), out=Path("a")),
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    checkpoint = open_checkpoint(path)
    model = infer_model(checkpoint)
    assert model.spec.family == "facebook-dlrm" and len(model.tensors) == len(state)
    found = values(checkpoint)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[f"state_dict.{name}"], tensor.numpy())
    assert checkpoint.scalars["hyper_parameters.lr"] == 0.1
    assert checkpoint.unread["hyper_parameters"].endswith(".AttributeDict")
    assert checkpoint.unread["callbacks.ModelCheckpoint{'monitor': None}"].endswith(".Callback")


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_objects_beside_the_weights_stay_inert(legacy, state, tmp_path, caplog):
    sentinel = tmp_path / "it_ran"
    path = tmp_path / "model.pt"
    content = {"state_dict": state, "hyper_parameters": {"x": Evil(sentinel)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert len(infer_model(checkpoint).tensors) == len(state)
    assert checkpoint.unread["hyper_parameters.x"] == "an object made by posix.system"
    assert not sentinel.exists()
    assert "names posix.system, which torch.load would run" in caplog.text
    torch.load(path, weights_only=False)  # without the reader it does run
    assert sentinel.exists()


def test_a_tensor_that_only_code_could_make_is_missed(state, tmp_path):
    class Built:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.path.join, ("a", "b")

    torch.save({**state, "emb_l.1.weight": Built()}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert checkpoint.unread == {"emb_l.1.weight": "an object made by posixpath.join"}
    with pytest.raises(Exception, match="not a whole facebook-dlrm model") as caught:
        infer_model(checkpoint)
    assert "missing: emb_l.1.weight" in caught.value.details


@pytest.mark.parametrize("kind", [torch.complex64, torch.float8_e4m3fn], ids=["complex", "float8"])
def test_tensors_of_other_types_are_left_out(kind, state, tmp_path):
    torch.save({"model": state, "x": torch.zeros(2).to(kind)}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert len(checkpoint.tensors) == len(state)
    assert [*checkpoint.unread] == ["x"]


def write(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
    return path


MANY = b"(" + b"N" * 10_000 + b"tq\x00"  # a tuple of 10,000, memoised
BOMBS = {
    "calls": MANY + b"csome\nName\nq\x01]q\x02(" + b"h\x01h\x00R" * 5_000 + b"e.",
    "listed calls": MANY + b"cpathlib\nPath\nq\x01](" + b"h\x01h\x00R" * 5_000 + b"e.",
    "objects": MANY + b"csome\nName\nq\x01](" + b"h\x01h\x00\x81Nb" * 5_000 + b"e.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_repeated_calls_cost_nothing(bomb, tmp_path):
    import tracemalloc

    path = write(tmp_path / "a.pt", b"\x80\x02" + BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def module_pickle(inner: bytes) -> bytes:
    """Pickle a module around what `inner` pushes as the dict of its modules."""
    parts = b"}X\x0b\x00\x00\x00_parameters}sX\x08\x00\x00\x00_buffers}sX\x08\x00\x00\x00_modules"
    head = parts[:1] + parts[1:].replace(b"}s", b"}s")
    return b"csome\nModule\n)\x81" + head + inner + b"sb"


def test_modules_that_hold_themselves_and_modules_that_multiply(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_MAX_ITEMS", 10_000)
    own = b"\x80\x02csome\nModule\n)\x81q\x00}(X\x0b\x00\x00\x00_parameters}"
    own += b"X\x08\x00\x00\x00_buffers}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00sub."
    with pytest.raises(CheckpointError, match="nests modules more than"):
        open_checkpoint(write(tmp_path / "a.pt", own))
    data = module_pickle(b"}")
    for level in range(30):
        name = bytes([level])
        data = data + b"q" + name + b"0"
        inner = b"}(X\x01\x00\x00\x00ah" + name + b"X\x01\x00\x00\x00bh" + name + b"u"
        data += module_pickle(inner)
    with pytest.raises(CheckpointError, match="holds over"):
        open_checkpoint(write(tmp_path / "b.pt", b"\x80\x02" + data + b"."))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_modules_that_were_compiled(tmp_path):
    """`torch.compile` wraps a module in another, of which it is an argument and not a part."""
    plain = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    inside = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    inside.load_state_dict(plain.state_dict())
    inside["b"] = torch.compile(inside["b"])
    expected = {name: tensor.tolist() for name, tensor in plain.state_dict().items()}
    for name, model in (("whole", torch.compile(plain)), ("inside", inside)):
        torch.save(model, tmp_path / f"{name}.pt")
        checkpoint = open_checkpoint(tmp_path / f"{name}.pt")
        assert {t.name: read_tensor(t).tolist() for t in checkpoint.tensors} == expected
