"""DLRMs whose parts do not fit the plain one.

FuxiCTR's without dense inputs or with batch norm, TorchEasyRec's that pass the embeddings on
beside their dot products.

Letters: B batch, D dense inputs, N embedding dim, K vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmt_convert.model.layers import DotPairs
from dmt_convert.model.networks.layers import Stack


class PairedDlrm(nn.Module):
    """logit = top([pairs or vectors, what is appended]).

    Args:
        config: `bottom`, a stack over the dense inputs, or null; `dense_first`, whether its output
            is the first vector, else the last; `pairs`, whether the top takes the dot products of
            all pairs (upper triangle, row by row), else the vectors side by side; `append`, what
            else it takes: `dense`, `sparse`; `top`, a stack that ends in one logit.
        dims: Embedding dims N_f of the features.
        num_dense: D.
    """

    def __init__(self, config: Mapping[str, Any], dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.dense_first, self.append = bool(config["dense_first"]), list(config["append"])
        self.bottom = Stack(config["bottom"], num_dense) if config["bottom"] else None
        own = [] if self.bottom is None else [self.bottom.width]
        count = len(dims) + len(own)
        self.pairs = bool(config["pairs"])
        width = count * (count - 1) // 2 if self.pairs else sum((*own, *dims))
        width += sum(own) * ("dense" in self.append) + sum(dims) * ("sparse" in self.append)
        self.top = Stack(config["top"], width)
        self.dots = DotPairs(count)

    def forward(self, dense_BD: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logit, shape (B,), of dense inputs and one tensor (B, N_f) per feature."""
        dense = [] if self.bottom is None else [self.bottom(dense_BD)]
        vectors = [*dense, *pooled] if self.dense_first else [*pooled, *dense]
        parts = [self.dots(torch.stack(vectors, dim=1))] if self.pairs else list(vectors)
        if "dense" in self.append:
            parts += dense
        if "sparse" in self.append:
            parts += pooled
        logit: Tensor = self.top(torch.cat(parts, dim=1))
        return logit.squeeze(1)
