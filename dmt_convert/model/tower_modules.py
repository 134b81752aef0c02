"""The torch modules of towers: they compress a tower's embeddings before these cross hosts.

A module is made of its spec and the embedding dims of the tower's features; `emit` maps pooled
embeddings side by side, (B, M), to what the tower emits, (B, O), and `forward` also rounds that as
its way between hosts does. A module that maps every feature
by itself says so with `feature_widths`: ranks that share a tower may then apply it to the features
that each looked up, before they exchange anything.

Letters: B batch, F features of the tower, M sum of their embedding dims, D output dim, K vectors
emitted. Source: the DMT paper, section "Tower Module"; see DESIGN, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmt_convert.model.code_modules import Code
from dmt_convert.model.layers import CrossNet, map_features
from dmt_convert.model.tower_kinds import TowerModuleSpec


class CodedModule(nn.Module, ABC):
    """A module whose output may travel between hosts in fewer bits than float32.

    Args:
        spec: The module.
        dims: Embedding dims of the tower's features.
    """

    code: Code | None
    """What rounding on the way does; None: nothing is rounded."""

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__()
        self.code = None if spec.code is None else Code(spec.code, spec.width(dims))

    @abstractmethod
    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Return what the tower emits before it is rounded, shape (B, O)."""

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Return what arrives at the hosts, shape (B, O)."""
        emitted = self.emit(pooled_BM)
        if self.code is None:
            return emitted
        arrived: Tensor = self.code(emitted)
        return arrived


class FeatureWise(CodedModule):
    """A module that may map every feature by itself."""

    @property
    def feature_widths(self) -> tuple[int, ...] | None:
        """Elements that every feature emits; None if features are combined."""
        return None

    def feature_maps(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias as `map_features` takes them; None for the identity."""
        return None


class Passthrough(FeatureWise):
    """Emits the embeddings as they are."""

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__(spec, dims)
        self.dims = tuple(dims)

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """The embedding dims."""
        return self.dims

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Return the input, shape (B, M)."""
        return pooled_BM


class DlrmTowerModule(FeatureWise):
    """An ensemble of two linear maps: c vectors per feature, and p per tower."""

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__(spec, dims)
        self.dims = tuple(dims)
        self.spec = spec
        if spec.c:
            width = spec.c * spec.dim
            self.feature_weight = nn.Parameter(_uniform((sum(dims), width), max(dims)))
            self.feature_bias = nn.Parameter(torch.zeros(len(dims), width))
        if spec.p:
            self.tower_weight = nn.Parameter(_uniform((spec.p * spec.dim, sum(dims)), sum(dims)))
            self.tower_bias = nn.Parameter(torch.zeros(spec.p * spec.dim))

    @property
    def feature_widths(self) -> tuple[int, ...] | None:
        """C * D for every feature, without vectors of the whole tower."""
        return None if self.spec.p else (self.spec.c * self.spec.dim,) * len(self.dims)

    def feature_maps(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the maps of features."""
        return self.feature_weight, self.feature_bias

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, K * D): feature 0's c vectors, feature 1's, ..., then the tower's p."""
        emitted = []
        if self.spec.c:
            emitted.append(map_features(pooled_BM, *self.feature_maps(), self.dims))
        if self.spec.p:
            emitted.append(nn.functional.linear(pooled_BM, self.tower_weight, self.tower_bias))
        return torch.cat(emitted, dim=1)


class DcnTowerModule(CodedModule):
    """A low-rank cross network over the tower, then a linear map to F * D."""

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__(spec, dims)
        width = sum(dims)
        self.cross = CrossNet.low_rank(width, min(spec.cross_rank, width), spec.cross_layers)
        self.weight = nn.Parameter(_uniform((len(dims) * spec.dim, width), width))
        self.bias = nn.Parameter(torch.zeros(len(dims) * spec.dim))

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, F * D)."""
        return nn.functional.linear(self.cross(pooled_BM), self.weight, self.bias)


class LinearTowerModule(CodedModule):
    """One linear map of the whole tower, M to D, without a bias: the receiver adds one."""

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__(spec, dims)
        self.weight = nn.Parameter(_uniform((spec.dim, sum(dims)), sum(dims)))

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, D)."""
        return nn.functional.linear(pooled_BM, self.weight)


def build_tower_module(spec: TowerModuleSpec, dims: Sequence[int]) -> nn.Module:
    """Build the module of one tower, randomly initialised as `nn.Linear` is.

    Args:
        spec: The module.
        dims: Embedding dims of the tower's features.
    """
    return spec.rules.build(spec, dims)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound)
