"""Tiny state dicts, and every container to put them in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

StateDict = dict[str, torch.Tensor]
Save = Callable[[Any, Path], Path]


def tiny_state() -> StateDict:
    """The tensors of a facebook DLRM with three tables, in its own order."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "emb_l.0.weight": (5, 4),
        "emb_l.1.weight": (1, 4),
        "emb_l.2.weight": (9, 4),
        "bot_l.0.weight": (4, 3),
        "bot_l.0.bias": (4,),
        "top_l.0.weight": (1, 10),
        "top_l.0.bias": (1,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_torch(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def save_legacy(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def save_safetensors(state: Any, folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_dcp(state: Any, folder: Path) -> Path:
    import warnings

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


SAVES: dict[str, Save] = {
    "torch": save_torch,
    "legacy": save_legacy,
    "safetensors": save_safetensors,
    "dcp": save_dcp,
}


@pytest.fixture(params=sorted(SAVES))
def save(request: pytest.FixtureRequest) -> Save:
    """One way to save a flat state dict; a test that takes it runs once per container."""
    return SAVES[request.param]


@pytest.fixture
def saves() -> dict[str, Save]:
    """All ways to save."""
    return SAVES


@pytest.fixture
def state() -> StateDict:
    """See `tiny_state`."""
    return tiny_state()


@pytest.fixture(scope="session")
def load_module() -> Callable[[str], ModuleType]:
    """Load a module beside the tests, by name."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parent / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
