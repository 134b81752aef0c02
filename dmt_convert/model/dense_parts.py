"""The dense parts of a recommendation model as plain torch modules.

Their state-dict names are the canonical names of `families.name_map`.
Letters: B batch, N embedding dim, K number of vectors, M width of the concatenation, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmt_convert.adapter import run_network
from dmt_convert.model.networks import build_network
from dmt_convert.spec import InteractionSpec, MlpSpec


class Mlp(nn.ModuleList):
    """Linear layers with ReLU between them (and behind the last, if the spec says so)."""

    def __init__(self, spec: MlpSpec) -> None:
        super().__init__(
            nn.Linear(fan_in, fan_out)
            for fan_in, fan_out in zip(spec.widths[:-1], spec.widths[1:], strict=True)
        )
        self.final_relu = spec.final_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in) to (B, out)."""
        for i, layer in enumerate(self):
            x = layer(x)
            if self.final_relu or i < len(self) - 1:
                x = torch.relu(x)
        return x


class CrossLayer(nn.Module):
    """One low-rank cross layer of DCNv2: x0 * (W V x + b) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.w = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, rank)))
        self.v = nn.Parameter(nn.init.xavier_normal_(torch.empty(rank, width)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BM: Tensor, x_BM: Tensor) -> Tensor:
        """Cross (B, M) with (B, M)."""
        z_BR = torch.nn.functional.linear(x_BM, self.v)
        return x0_BM * torch.nn.functional.linear(z_BR, self.w, self.bias) + x_BM


class CrossNet(nn.ModuleList):
    """A stack of low-rank cross layers. Source: arXiv 2008.13535, equation 2."""

    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__(CrossLayer(width, rank) for _ in range(layers))

    def forward(self, x0_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, M)."""
        x_BM = x0_BM
        for layer in self:
            x_BM = layer(x0_BM, x_BM)
        return x_BM


def pair_indices(count: int, spec: InteractionSpec) -> tuple[Tensor, Tensor]:
    """Row and column of every pair of `count` vectors, in the order of the interaction.

    Returns:
        Two int64 tensors of shape (number of pairs,).
    """
    if spec.pair_order == "tril":
        pairs = torch.tril_indices(count, count, 0 if spec.self_pairs else -1, device="cpu")
    else:
        pairs = torch.triu_indices(count, count, 0 if spec.self_pairs else 1, device="cpu")
    return pairs[0], pairs[1]


class DotPairs(nn.Module):
    """All pairwise dot products among K vectors of the same width."""

    cells: Tensor

    def __init__(self, count: int, spec: InteractionSpec) -> None:
        super().__init__()
        left, right = pair_indices(count, spec)
        self.register_buffer("cells", left * count + right, persistent=False)

    def forward(self, vectors_BKN: Tensor) -> Tensor:
        """Map (B, K, N) to (B, pairs)."""
        gram_BKK = torch.bmm(vectors_BKN, vectors_BKN.transpose(1, 2))
        # [:, left, right] is the same, and several times as slow in both directions
        return gram_BKK.flatten(1).index_select(1, self.cells)


class Interaction(nn.Module):
    """Where the dense vector and all other vectors meet.

    Args:
        spec: The interaction.
        dims: Widths of the inputs, the dense vector first.
        dense_dim: dot only: width of the dense vector that is passed on beside the pairs, where
            it differs from the one that is paired (a converted model pairs its projection).
    """

    def __init__(self, spec: InteractionSpec, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.kind = spec.kind
        self.dims = dims
        self.count = len(dims)
        self.dim = dims[0]
        if spec.kind == "dot":
            self.pairs = DotPairs(len(dims), spec)
        elif spec.kind == "dcn":
            self.cross = CrossNet(sum(dims), spec.cross_rank, spec.cross_layers)
        elif spec.kind == "projection":
            assert spec.branch1 is not None and spec.branch2 is not None
            self.branch1, self.branch2 = Mlp(spec.branch1), Mlp(spec.branch2)
        elif spec.kind == "network":
            assert spec.network is not None
            self.network_spec = spec.network
            self.network = build_network(spec.network, dims[1:], dims[0]).eval()

    def train(self, mode: bool = True) -> Interaction:
        """Set the mode; a network stays in eval mode: its running statistics are the trainer's."""
        super().train(mode)
        if self.kind == "network":
            self.network.eval()
        return self

    def forward(self, dense_BN: Tensor, sparse_BM: Tensor, passed_BN: Tensor) -> Tensor:
        """Let the inputs interact.

        Args:
            dense_BN: The dense vector that takes part, shape (B, dims[0]).
            sparse_BM: All other vectors side by side, shape (B, sum(dims[1:])).
            passed_BN: dot and projection: the dense vector that is passed on beside the
                interaction; the same as dense_BN in a flat model.

        Returns:
            What over_arch takes, shape (B, width); a network's logit, shape (B, 1).
        """
        if self.kind == "network":
            pooled = list(torch.split(sparse_BM, list(self.dims[1:]), dim=1))
            return run_network(self.network_spec, self.network, dense_BN, pooled).unsqueeze(1)
        x_BM = torch.cat((dense_BN, sparse_BM), dim=1)
        if self.kind == "cat":
            return x_BM
        if self.kind == "dcn":
            crossed: Tensor = self.cross(x_BM)
            return crossed
        if self.kind == "dot":
            vectors_BKN = x_BM.reshape(-1, self.count, self.dim)
            return torch.cat((passed_BN, self.pairs(vectors_BKN)), dim=1)
        dim = passed_BN.shape[1]
        left = self.branch1(x_BM).reshape(x_BM.shape[0], -1, dim)
        right = self.branch2(x_BM).reshape(x_BM.shape[0], dim, -1)
        return torch.cat((passed_BN, torch.bmm(left, right).reshape(x_BM.shape[0], -1)), dim=1)
