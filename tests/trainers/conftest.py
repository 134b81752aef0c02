"""Models as their trainers compute them, written anew, and what becomes of their checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion.initialisation import initialise
from dmt_convert.conversion.quality import logits_of
from dmt_convert.data import Bag, Batch
from dmt_convert.families import ModelConfig, infer_model
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, open_flat_model


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def deepctr() -> ModuleType:
    """DeepCTR-Torch's models."""
    return _load("deepctr_models")


@pytest.fixture(scope="session")
def fuxictr() -> ModuleType:
    """FuxiCTR's models."""
    return _load("fuxictr_models")


@pytest.fixture(scope="session")
def tzrec() -> ModuleType:
    """TorchEasyRec's models."""
    return _load("tzrec_models")


def stir(model: nn.Module) -> nn.Module:
    """Give every tensor some value, batch norm's statistics too, and stop training."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            scale = 1.2 / max(value.shape[-1], 1) ** 0.5 if value.ndim > 1 else 0.3
            drawn = torch.randn(value.shape, generator=generator) * scale
            scales = value.ndim == 1 and name.endswith((".weight", "running_var"))
            value.copy_(drawn.abs() + 0.5 if scales else drawn)
    return model.eval().requires_grad_(False)


def make_batch(rows: dict[str, int], num_dense: int, *, multi=(), count: int = 17) -> Batch:
    """Ids from 1; features in `multi` have bags of 0 to 3 ids."""
    rng = np.random.default_rng(5)
    bags = []
    for name, size in rows.items():
        lengths = rng.integers(0, 4, count) if name in multi else np.ones(count, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        bags.append(Bag(values=rng.integers(1, size, int(offsets[-1])), offsets=offsets))
    dense = rng.standard_normal((count, num_dense)).astype(np.float32)
    return Batch(dense=dense, feature_names=tuple(rows), bags=tuple(bags))


def pad(bag: Bag, length: int = 3) -> torch.Tensor:
    """Ids of every row behind one another, then zeros: shape (B, length)."""
    out = np.zeros((len(bag.offsets) - 1, length), dtype=np.int64)
    for i, (begin, end) in enumerate(zip(bag.offsets[:-1], bag.offsets[1:], strict=True)):
        out[i, : end - begin] = bag.values[begin:end]
    return torch.from_numpy(out)


def same_logits(path: Path, batch: Batch, expected: torch.Tensor, config=None, *, atol=1e-5):
    """Read a checkpoint, and compare flat and through passthrough towers.

    Returns what was inferred. Sums are in another order than the trainer's, hence `atol`.
    """
    info = infer_model(open_checkpoint(path), config or ModelConfig())
    flat = open_flat_model(info)
    order = [batch.feature_names.index(name) for name in info.spec.feature_names]
    ordered = Batch(
        dense=batch.dense,
        feature_names=info.spec.feature_names,
        bags=tuple(batch.bags[i] for i in order),
    )
    logits = logits_of(flat, ordered)
    assert np.std(logits) > 0.05
    np.testing.assert_allclose(logits, expected.flatten().numpy(), atol=atol, rtol=0)
    module = TowerModuleSpec(kind="passthrough")
    names = info.spec.feature_names
    towers = [TowerSpec(features=names[t::2], module=module) for t in range(2)]
    model, _ = initialise(flat, DmtSpec(flat=info.spec, towers=tuple(towers)), None, method="exact")
    np.testing.assert_allclose(logits_of(model, ordered), logits, atol=1e-6, rtol=0)
    return info


@pytest.fixture(scope="session")
def tools():
    """All helpers."""
    from types import SimpleNamespace

    return SimpleNamespace(stir=stir, make_batch=make_batch, pad=pad, same_logits=same_logits)
