"""Tower modules: what compresses a tower's embeddings before they cross hosts.

Letters: B batch, F features of the tower, N embedding dim, M their widths' sum, D output dim,
K vectors emitted. Source: the DMT paper, section "Tower Module"; see DESIGN, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmt_convert.model.dense_parts import CrossNet
from dmt_convert.model.dmt_spec import TowerModuleSpec


class Passthrough(nn.Module):
    """Emits the embeddings as they are."""

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Return the input, shape (B, M)."""
        return pooled_BM


class DlrmTowerModule(nn.Module):
    """An ensemble of two linear maps: c vectors per feature, and p per tower.

    Args:
        spec: c, p and D.
        dims: Embedding dims of the tower's features.
    """

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.spec = spec
        if spec.c:
            width = spec.c * spec.dim
            self.feature_weight = nn.Parameter(_uniform((sum(dims), width), max(dims)))
            self.feature_bias = nn.Parameter(torch.zeros(len(dims), width))
        if spec.p:
            self.tower_weight = nn.Parameter(_uniform((spec.p * spec.dim, sum(dims)), sum(dims)))
            self.tower_bias = nn.Parameter(torch.zeros(spec.p * spec.dim))

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, K * D): feature 0's c vectors, feature 1's, ..., then the tower's p."""
        emitted = []
        if self.spec.c:
            emitted.append(self._per_feature(pooled_BM))
        if self.spec.p:
            emitted.append(nn.functional.linear(pooled_BM, self.tower_weight, self.tower_bias))
        return torch.cat(emitted, dim=1)

    def _per_feature(self, pooled_BM: Tensor) -> Tensor:
        if len(set(self.dims)) == 1:
            count, dim = len(self.dims), self.dims[0]
            x_FBN = pooled_BM.reshape(-1, count, dim).transpose(0, 1)
            y_FBW = torch.baddbmm(
                self.feature_bias.unsqueeze(1), x_FBN, self.feature_weight.reshape(count, dim, -1)
            )
            return y_FBW.transpose(0, 1).flatten(1)
        pieces = zip(
            torch.split(pooled_BM, list(self.dims), dim=1),
            torch.split(self.feature_weight, list(self.dims), dim=0),
            self.feature_bias,
            strict=True,
        )
        return torch.cat([x @ weight + bias for x, weight, bias in pieces], dim=1)


class DcnTowerModule(nn.Module):
    """A low-rank cross network over the tower, then a linear map to F * D.

    Args:
        spec: Cross layers and rank, D.
        dims: Embedding dims of the tower's features.
    """

    def __init__(self, spec: TowerModuleSpec, dims: Sequence[int]) -> None:
        super().__init__()
        width = sum(dims)
        self.cross = CrossNet(width, min(spec.cross_rank, width), spec.cross_layers)
        self.weight = nn.Parameter(_uniform((len(dims) * spec.dim, width), width))
        self.bias = nn.Parameter(torch.zeros(len(dims) * spec.dim))

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, F * D)."""
        return nn.functional.linear(self.cross(pooled_BM), self.weight, self.bias)


class LinearTowerModule(nn.Linear):
    """One linear map of the whole tower, M to D, without a bias: the receiver adds one."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(width, dim, bias=False)


def build_tower_module(spec: TowerModuleSpec, dims: Sequence[int]) -> nn.Module:
    """Build the module of one tower, randomly initialised as `nn.Linear` is.

    Args:
        spec: The module.
        dims: Embedding dims of the tower's features.
    """
    if spec.kind == "passthrough":
        return Passthrough()
    if spec.kind == "linear":
        return LinearTowerModule(sum(dims), spec.dim)
    if spec.kind == "dlrm":
        return DlrmTowerModule(spec, dims)
    return DcnTowerModule(spec, dims)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound)
