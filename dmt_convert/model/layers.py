"""Layers that several parts of a model share.

Letters: B batch, F features, K vectors, N their width, M sum of widths, R rank, W emitted width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from dmt_convert.interactions import PairRow, pair_rows
from dmt_convert.spec import MlpSpec, PairOrder

_PART_ELEMENTS: Final = 1 << 24
"""Dot products that are held at once, if they need not all be: 64 MiB."""


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
            x = self._activate(i, layer(x))
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Map the first layer's output before its ReLU to (B, out)."""
        for i, layer in enumerate(self):
            x = self._activate(i, layer(x) if i else x)
        return x

    def _activate(self, layer: int, x: Tensor) -> Tensor:
        return torch.relu(x) if self.final_relu or layer < len(self) - 1 else x


class LowRankCross(nn.Module):
    """A cross layer of DCNv2 in low rank: x0 * (W V x + b) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.w = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, rank)))
        self.v = nn.Parameter(nn.init.xavier_normal_(torch.empty(rank, width)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BM: Tensor, x_BM: Tensor) -> Tensor:
        """Cross (B, M) with (B, M)."""
        inner_BR = nn.functional.linear(x_BM, self.v)
        return x0_BM * nn.functional.linear(inner_BR, self.w, self.bias) + x_BM


class CrossNet(nn.ModuleList):
    """Cross layers one behind the other; each takes the first input and the last output.

    Source: arXiv 2008.13535, equation 2.
    """

    @classmethod
    def low_rank(cls, width: int, rank: int, layers: int) -> CrossNet:
        """Make a network of `LowRankCross` layers."""
        return cls(LowRankCross(width, rank) for _ in range(layers))

    def forward(self, x0_BM: Tensor, *shared: Tensor) -> Tensor:
        """Map (B, M) to (B, M).

        Args:
            x0_BM: The input.
            shared: Weights that all layers share.
        """
        x_BM = x0_BM
        for layer in self:
            x_BM = layer(x0_BM, x_BM, *shared)
        return x_BM


def pair_indices(
    count: int, order: PairOrder = "triu", *, self_pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """Row and column of every pair of `count` vectors, in row-major order of a triangle.

    Returns:
        Two int64 tensors of shape (number of pairs,), on the CPU.
    """
    if order == "tril":
        pairs = torch.tril_indices(count, count, 0 if self_pairs else -1, device="cpu")
    else:
        pairs = torch.triu_indices(count, count, 0 if self_pairs else 1, device="cpu")
    return pairs[0], pairs[1]


class DotPairs(nn.Module):
    """All pairwise dot products among K vectors of the same width; arguments of `pair_indices`."""

    cells: Tensor

    def __init__(self, count: int, order: PairOrder = "triu", *, self_pairs: bool = False) -> None:
        super().__init__()
        self._triangle = (count, order, self_pairs)
        left, right = pair_indices(count, order, self_pairs=self_pairs)
        self.register_buffer("cells", left * count + right, persistent=False)

    def forward(self, vectors_BKN: Tensor) -> Tensor:
        """Map (B, K, N) to (B, pairs)."""
        gram_BKK = torch.bmm(vectors_BKN, vectors_BKN.transpose(1, 2))
        # [:, left, right] is the same, and several times as slow in both directions
        return gram_BKK.flatten(1).index_select(1, self.cells)

    def is_wide(self, batch: int) -> bool:
        """Whether the products of so many rows should be computed part by part."""
        return batch * self._triangle[0] ** 2 > _PART_ELEMENTS

    def parts(self, batch: int) -> Iterator[list[PairRow]]:
        """Cut the triangle of pairs into parts that take 64 MiB for so many rows of a batch."""
        count, order, self_pairs = self._triangle
        most = max(1, _PART_ELEMENTS // max(1, batch * count))
        rows = list(pair_rows(count, order, self_pairs=self_pairs))
        for begin in range(0, count, most):
            yield rows[begin : begin + most]


def map_pairs(vectors_BKN: Tensor, weight_HP: Tensor, part: Sequence[PairRow]) -> Tensor:
    """Apply a linear map to the dot products of a part of all pairs, shape (B, H).

    Args:
        vectors_BKN: All vectors.
        weight_HP: The map; a column for every pair of the part, in their order.
        part: The pairs.
    """
    first, last = part[0].vector, part[-1].vector + 1
    begin, end = min(row.others.start for row in part), max(row.others.stop for row in part)
    gram_BRK = torch.bmm(vectors_BKN[:, first:last], vectors_BKN[:, begin:end].transpose(1, 2))
    # The map is widened by zeros instead of picking the pairs from the products, which are many
    # more: picking them took most of the time, in both directions.
    width = end - begin
    cells = [
        torch.arange(row.others.start, row.others.stop, device="cpu") + (i * width - begin)
        for i, row in enumerate(part)
    ]
    wide_HC = weight_HP.new_zeros(len(weight_HP), len(part) * width).index_copy(
        1, torch.cat(cells).to(weight_HP.device), weight_HP
    )
    return nn.functional.linear(gram_BRK.flatten(1), wide_HC)


def map_features(
    pooled_BM: Tensor, weight_MW: Tensor, bias_FW: Tensor, dims: Sequence[int]
) -> Tensor:
    """Apply a linear map of its own to every feature.

    Args:
        pooled_BM: Pooled embeddings side by side.
        weight_MW: The maps, one below the other: the rows of a feature are its dims.
        bias_FW: A bias for each.
        dims: Embedding dim of every feature.

    Returns:
        Shape (B, F * W), feature by feature.
    """
    if len(set(dims)) == 1:
        count, dim = len(dims), dims[0]
        x_FBN = pooled_BM.reshape(-1, count, dim).transpose(0, 1)
        y_FBW = torch.baddbmm(bias_FW.unsqueeze(1), x_FBN, weight_MW.reshape(count, dim, -1))
        return y_FBW.transpose(0, 1).flatten(1)
    parts = zip(
        torch.split(pooled_BM, list(dims), dim=1),
        torch.split(weight_MW, list(dims), dim=0),
        bias_FW,
        strict=True,
    )
    return torch.cat([x @ weight + bias for x, weight, bias in parts], dim=1)
