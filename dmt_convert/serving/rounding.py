"""How far two right runtimes may be apart: it follows from the sums that a model takes.

Runtimes add fp32 numbers in another order. What that changes depends on the size of the terms, and
not on the size of their sum: where large terms cancel, a small result carries the rounding of large
ones. So the size is measured. Every number that a model starts from (its weights, dense inputs,
ids' weights) is changed by up to one part in 4,096, at random. By how much every stage changes,
scaled down to one rounding, is what single roundings come to by the time they reach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from dmt_convert.data import Bag, Batch
from dmt_convert.model import DmtModel

_ROUNDING: Final = 2.0**-24
"""Of one fp32 operation, relative to its result."""
_STEP: Final = 2.0**-12
"""Far above a rounding, so that roundings do not hide its effect, and small enough to be linear."""
_DRAWS: Final = 3
"""One could leave the few rows of a small batch where they are by chance."""
_SLACK: Final = 4.0
"""Two runtimes round, each its own way, and the largest of many differences counts."""


def rounding_sizes(model: DmtModel, batch: Batch) -> dict[str, float]:
    """Return how far each stage of a model may be off by rounding.

    A sum of n terms is rounded n times, at the size of its partial sums, so that its error is about
    sqrt(n) times that of one rounding; n is that of the longest sum.

    Args:
        model: The model; its weights are changed for a moment.
        batch: Rows.
    """
    expected = dict(model.stages(batch))
    moved = dict.fromkeys(expected, 0.0)
    for seed in range(_DRAWS):
        rng = np.random.default_rng(seed)
        with _moved_weights(model, seed):
            for name, value in model.stages(_moved_batch(batch, rng)):
                change = float((value - expected[name]).abs().max()) if value.numel() else 0.0
                moved[name] = max(moved[name], change)
    factor = _SLACK * _ROUNDING / _STEP * _longest_sum(model, batch) ** 0.5
    return {name: factor * change for name, change in moved.items()}


def _longest_sum(model: DmtModel, batch: Batch) -> int:
    layers = [weight.shape[-1] for weight in model.parameters() if weight.dim() > 1]
    bags = [int(np.diff(bag.offsets).max(initial=0)) for bag in batch.bags]
    return max(1, *layers, *bags)


@contextmanager
def _moved_weights(model: DmtModel, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            factors = torch.rand(weight.shape, generator=generator).mul_(2 * _STEP).add_(1 - _STEP)
            weight.data.mul_(factors)
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)


def _moved_batch(batch: Batch, rng: np.random.Generator) -> Batch:
    def move(values: np.ndarray) -> np.ndarray:
        factors = 1 + _STEP * rng.uniform(-1, 1, size=values.shape)
        return (values * factors).astype(np.float32)

    def moved(bag: Bag) -> Bag:
        ones = np.ones(len(bag.values), dtype=np.float32)
        return replace(bag, weights=move(ones if bag.weights is None else bag.weights))

    return replace(batch, dense=move(batch.dense), bags=tuple(map(moved, batch.bags)))
