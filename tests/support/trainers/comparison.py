"""What a trainer's model says, and what is made of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion.initialisation import initialise
from dmt_convert.conversion.quality import logits_of
from dmt_convert.data import Bag, Batch
from dmt_convert.families import ModelConfig, infer_model
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, open_flat_model
from support.rows import random_bag


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


def draw_rows(rows: dict[str, int], num_dense: int, *, multi=(), count: int = 17) -> Batch:
    """Ids from 1; features in `multi` have bags of 0 to 3 ids."""
    rng = np.random.default_rng(5)
    return Batch(
        bags=tuple(
            random_bag(rng, size, count, most=3 if name in multi else 1, first=1)
            for name, size in rows.items()
        ),
        dense=rng.standard_normal((count, num_dense)).astype(np.float32),
        feature_names=tuple(rows),
    )


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
