"""What the dense parts of a model compute and hold, counted from its spec.

Interactions and tower modules count their own work (`Interaction.work`, `TowerModule.work`). The
loss is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dmt_convert.interactions import DenseWork, InteractionSpec, linear_work
from dmt_convert.model import DmtSpec, TowerModuleSpec

BACKWARD: Final = 2.0
"""The backward pass computes gradients of inputs and of weights: twice the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """What all dense parts of a model cost."""

    dense_arch: DenseWork
    """MLP over the dense inputs: needs no embedding."""
    over: DenseWork
    """Interaction and over_arch, and the projection of the dense vector."""
    towers: tuple[DenseWork, ...]
    """The module of every tower."""


def count_work(model: DmtSpec) -> ModelWork:
    """Count FLOPs and parameters. Those of a passthrough model are the flat model's."""
    flat, pairs = model.flat, list(zip(model.towers, model.dims_by_tower, strict=True))
    over = _interaction_work(model) + model.over_arch.work
    if model.rules.restores:
        for width, dims in zip(model.tower_widths, model.dims_by_tower, strict=True):
            over += linear_work(width, sum(dims))
    if model.dense_dim != flat.input_dims[0]:
        over += linear_work(flat.input_dims[0], model.dense_dim)
    return ModelWork(
        dense_arch=flat.dense_arch.work,
        over=over,
        towers=tuple(
            tower.module.rules.work(tower.module, dims) or _built_work(tower.module, dims)
            for tower, dims in pairs
        ),
    )


def _interaction_work(model: DmtSpec) -> DenseWork:
    spec, dims = model.interaction, model.interaction_dims
    return spec.rules.work(spec, dims) or _built_work(spec, dims)


def _built_work(spec: InteractionSpec | TowerModuleSpec, dims: tuple[int, ...]) -> DenseWork:
    """Count a module without a formula as if all its parameters were weights of linear layers."""
    from dmt_convert.model import count_parameters

    parameters = count_parameters(spec, dims)
    return DenseWork(flops=2.0 * parameters, parameters=parameters)
