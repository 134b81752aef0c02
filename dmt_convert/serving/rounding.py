"""How far two right runtimes may be apart: it follows from the sums that a model takes.

Runtimes add fp32 numbers in another order. What that changes depends on the size of the terms, and
not on the size of their sum: where large terms cancel, a small result carries the rounding of large
ones. So the size is measured. Every number that a model starts from (its weights, dense inputs,
ids' weights) is changed by up to one part in 4,096, at random. By how much every stage changes,
scaled down to one rounding, is what single roundings come to by the time they reach it.

If a tower sends in a code, an element near the edge between two levels may be rounded to either of
them, and is then off by a whole step. That is right where the edge is within the tolerance of the
element before its code, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dmt_convert.data import Bag, Batch
from dmt_convert.model import CodedModule, DmtModel

_ROUNDING: Final = 2.0**-24
"""Of one fp32 operation, relative to its result."""
_STEP: Final = 2.0**-12
"""Far above a rounding, so that roundings do not hide its effect, and small enough to be linear."""
_DRAWS: Final = 3
"""One could leave the few rows of a small batch where they are by chance."""
_SLACK: Final = 4.0
"""Two runtimes round, each its own way, and the largest of many differences counts."""
_CORNERS: Final = 8
"""Draws of levels; the first takes all upper ones, so that one such element is tried surely."""
_EDGE_SLACK: Final = 2.0
"""Of several such elements, the draws may miss the worst choice."""
Range = tuple[Tensor, Tensor]
"""Lowest and highest right value of every element, each of shape (B, O)."""


def rounding_sizes(model: DmtModel, batch: Batch) -> dict[str, float]:
    """Return how far each stage of a model may be off by rounding.

    A sum of n terms is rounded n times, at the size of its partial sums, so that its error is about
    sqrt(n) times that of one rounding; n is that of the longest sum.

    Args:
        model: The model; its weights are changed for a moment. Steps of codes would hide small
            changes and exaggerate others: call it `without_codes`.
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


@contextmanager
def without_codes(model: DmtModel) -> Iterator[None]:
    """Let towers emit what they do before it is rounded as on its way between hosts."""
    modules = [tower.tower_module for tower in model.tower_list]
    coded = [m for m in modules if isinstance(m, CodedModule) and m.code is not None]
    codes = [module.code for module in coded]
    try:
        for module in coded:
            module.code = None
        yield
    finally:
        for module, code in zip(coded, codes, strict=True):
            module.code = code


def edge_sizes(model: DmtModel, dense_BD: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Return how far every logit may be off because elements arrive at the next level, (B,).

    Elements that may arrive at either of two levels do so at random, some times over. Rows without
    such elements get 0.

    Args:
        model: The model.
        dense_BD: Dense inputs.
        ranges: The lowest and the highest right value of every tower's elements.
    """
    low_BO, high_BO = (torch.cat(parts, dim=1) for parts in zip(*ranges, strict=True))
    if torch.equal(low_BO, high_BO):
        return torch.zeros(len(low_BO))
    generator = torch.Generator().manual_seed(0)
    first = model.forward_emitted(dense_BD, low_BO)
    moved = torch.zeros_like(first)
    for draw in range(_CORNERS):
        upper = torch.rand(low_BO.shape, generator=generator) < (1.0 if draw == 0 else 0.5)
        logits = model.forward_emitted(dense_BD, torch.where(upper, high_BO, low_BO))
        moved = torch.maximum(moved, (logits - first).abs())
    return torch.where((low_BO == high_BO).all(dim=1), 0.0, _EDGE_SLACK * moved)


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
