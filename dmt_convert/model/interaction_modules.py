"""The torch modules of interactions.

The `forward` of each takes three tensors:

- `dense_BN`: the dense vector that takes part, shape (B, dims[0]);
- `sparse_BM`: all other vectors side by side, shape (B, sum(dims[1:]));
- `passed_BN`: the dense vector that dot and projection hand on beside the interaction. It is
  `dense_BN` in a flat model; a converted model may pair a projection of it.

It returns what over_arch takes, shape (B, width). The names of weights in a state dict are the
canonical ones of checkpoints. Letters: B batch, N dim, K vectors, M sum of the input widths.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmt_convert.adapter import run_network
from dmt_convert.model.layers import CrossNet, DotPairs, Mlp, map_pairs
from dmt_convert.model.networks import build_network
from dmt_convert.spec import InteractionSpec


class DotInteraction(nn.Module):
    """[passed dense vector, dot products of all pairs]."""

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (len(dims), dims[0])
        self.pairs = DotPairs(len(dims), spec.pair_order, self_pairs=spec.self_pairs)

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Pair all vectors."""
        return torch.cat((passed_BN, self.pairs(self._vectors(dense_BN, sparse_BM))), dim=1)

    def map_output(
        self, layer: nn.Linear, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor
    ) -> Tensor:
        """Apply a linear layer to the output, shape (B, H), without ever holding all pairs.

        A gradient computes the pairs again instead of keeping them.
        """
        vectors_BKN = self._vectors(dense_BN, sparse_BM)
        width = passed_BN.shape[1]
        mapped_BH = nn.functional.linear(passed_BN, layer.weight[:, :width], layer.bias)
        for part in self.pairs.parts(len(vectors_BKN)):
            columns = slice(width + part[0].columns.start, width + part[-1].columns.stop)
            arguments = (vectors_BKN, layer.weight[:, columns], part)
            if torch.is_grad_enabled():
                mapped_BH = mapped_BH + checkpoint(map_pairs, *arguments, use_reentrant=False)
            else:
                mapped_BH += map_pairs(*arguments)
        return mapped_BH

    def _vectors(self, dense_BN: Tensor, sparse_BM: Tensor) -> Tensor:
        return torch.cat((dense_BN, sparse_BM), dim=1).reshape(-1, *self.shape)


class CatInteraction(nn.Module):
    """All inputs side by side."""

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Join the inputs."""
        return torch.cat((dense_BN, sparse_BM), dim=1)


class CrossInteraction(nn.Module):
    """A low-rank cross network over all inputs."""

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.cross = CrossNet.low_rank(sum(dims), spec.cross_rank, spec.cross_layers)

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Cross the inputs."""
        crossed: Tensor = self.cross(torch.cat((dense_BN, sparse_BM), dim=1))
        return crossed


class ProjectionInteraction(nn.Module):
    """[passed dense vector, branch1 x branch2]: products of vectors that two MLPs give."""

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()
        assert spec.branch1 is not None and spec.branch2 is not None
        self.branch1, self.branch2 = Mlp(spec.branch1), Mlp(spec.branch2)

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Let the branches meet."""
        x_BM = torch.cat((dense_BN, sparse_BM), dim=1)
        rows, dim = passed_BN.shape
        left = self.branch1(x_BM).reshape(rows, -1, dim)
        right = self.branch2(x_BM).reshape(rows, dim, -1)
        return torch.cat((passed_BN, torch.bmm(left, right).reshape(rows, -1)), dim=1)


class NetworkInteraction(nn.Module):
    """A model's own dense part; its output is the logit, shape (B, 1)."""

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()
        assert spec.network is not None
        self.dims, self.network_spec = dims, spec.network
        self.network = build_network(spec.network, dims[1:], dims[0]).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but not the network's: its running statistics are the trainer's."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Run the network."""
        pooled = list(torch.split(sparse_BM, list(self.dims[1:]), dim=1))
        return run_network(self.network_spec, self.network, dense_BN, pooled).unsqueeze(1)
