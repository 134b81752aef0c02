"""What the dense parts of a model compute and hold, counted from its spec.

Letters: N embedding dim, D output dim, K vectors emitted, r rank of a cross layer. A product of a
(m, n) matrix with a vector is 2 m n FLOPs; biases, ReLUs and the loss are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dmt_convert.model import DmtSpec, TowerModuleSpec
from dmt_convert.spec import InteractionSpec, MlpSpec, NetworkSpec

BACKWARD: Final = 2.0
"""The backward pass computes gradients of inputs and of weights: twice the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWork:
    """What a part costs."""

    flops: float
    """Forward pass, per sample."""
    parameters: int
    """Weights and biases."""

    def __add__(self, other: DenseWork) -> DenseWork:
        """Both parts."""
        return DenseWork(
            flops=self.flops + other.flops, parameters=self.parameters + other.parameters
        )


NO_WORK = DenseWork(flops=0.0, parameters=0)


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
    """Count FLOPs and parameters; of a passthrough model they are the flat model's."""
    over = _interaction(model.interaction, model.interaction_dims) + _mlp(model.over_arch)
    if model.kind == "linear":  # the receiver undoes every tower's map
        for tower, dims in zip(model.towers, model.dims_by_tower, strict=True):
            over += _linear(tower.module.dim, sum(dims))
    if not model.keeps_network and model.flat.interaction.kind == "dot":
        over += _linear(model.flat.input_dims[0], model.dense_dim)
    return ModelWork(
        dense_arch=_mlp(model.flat.dense_arch),
        over=over,
        towers=tuple(
            _tower(tower.module, dims)
            for tower, dims in zip(model.towers, model.dims_by_tower, strict=True)
        ),
    )


def _linear(inputs: int, outputs: int) -> DenseWork:
    return DenseWork(flops=2.0 * inputs * outputs, parameters=(inputs + 1) * outputs)


def _mlp(spec: MlpSpec) -> DenseWork:
    work = NO_WORK
    for inputs, outputs in zip(spec.widths, spec.widths[1:], strict=False):
        work += _linear(inputs, outputs)
    return work


def _cross(width: int, rank: int, layers: int) -> DenseWork:
    return DenseWork(
        flops=4.0 * width * rank * layers, parameters=(2 * width * rank + width) * layers
    )


def _network(spec: NetworkSpec, dims: Sequence[int]) -> DenseWork:
    """Count a network as if all of it were linear layers."""
    from dmt_convert.model.networks import network_size

    count = network_size(spec, tuple(dims[1:]), dims[0])
    return DenseWork(flops=2.0 * count, parameters=count)


def _interaction(spec: InteractionSpec, dims: Sequence[int]) -> DenseWork:
    width = sum(dims)
    if spec.network is not None:
        return _network(spec.network, dims)
    if spec.kind == "dot":
        return DenseWork(flops=2.0 * len(dims) ** 2 * dims[0], parameters=0)
    if spec.kind == "dcn":
        return _cross(width, spec.cross_rank, spec.cross_layers)
    if spec.kind == "projection":
        assert spec.branch1 is not None and spec.branch2 is not None
        product = spec.branch1.widths[-1] * spec.branch2.widths[-1] / dims[0]
        return (
            _mlp(spec.branch1) + _mlp(spec.branch2) + DenseWork(flops=2.0 * product, parameters=0)
        )
    return NO_WORK


def _tower(module: TowerModuleSpec, dims: Sequence[int]) -> DenseWork:
    width, out = sum(dims), module.dim
    if module.kind == "passthrough":
        return NO_WORK
    if module.kind == "linear":
        return DenseWork(flops=2.0 * width * out, parameters=width * out)
    if module.kind == "dcn":
        rank = min(module.cross_rank, width)
        return _cross(width, rank, module.cross_layers) + _linear(width, len(dims) * out)
    # c: every feature has a map of its own; p: one map of the whole tower.
    per_feature = DenseWork(
        flops=2.0 * width * module.c * out, parameters=(width + len(dims)) * module.c * out
    )
    return per_feature + _linear(width, module.p * out)
