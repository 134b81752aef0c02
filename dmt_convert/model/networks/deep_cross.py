"""Deep and cross networks with linear and FM terms.

DeepCTR's DCN, DCNMix, DeepFM and WDL; the DCNv2 of FuxiCTR and of TorchEasyRec.
Letters: B batch, D dense inputs, N embedding dim, M width of the network's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmt_convert.model.networks.layers import CrossStack, Stack


class DeepCross(nn.Module):
    """A sum of linear terms, a factorisation machine, and a head over a cross network and a DNN.

    With x the inputs side by side, the head takes
    final([stacked(cross(backbone(x))), parallel(x)]); any part may be missing.

    Args:
        config: `inputs`, a list of `["feature", i]`, `["dense", d]` and `["scaled", d, width]`
            (a dense input times a vector of its own); the stacks `backbone`, `stacked`,
            `parallel` and `final`; `cross`, see `CrossStack`; `wide`, the features whose last
            column is a linear term, and `wide_dense`, whether the dense inputs have one; `fm`,
            the features that factorisation machines pair; `head` and `bias`.
        dims: Widths N_f of the features, linear term included.
        num_dense: D.
    """

    def __init__(self, config: Mapping[str, Any], dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.wide, self.fm = list(config["wide"]), list(config["fm"])
        self.inputs = [list(entry) for entry in config["inputs"]]
        vectors = [dim - (i in self.wide) for i, dim in enumerate(dims)]
        scaled = {str(entry[1]): entry[2] for entry in self.inputs if entry[0] == "scaled"}
        self.scales = nn.ParameterDict({key: torch.ones(width) for key, width in scaled.items()})
        width = sum(vectors[e[1]] if e[0] == "feature" else (*e, 1)[2] for e in self.inputs)
        self.backbone, crossed = _stack(config, "backbone", width)
        self.cross = CrossStack(config["cross"], crossed) if config["cross"] else None
        self.stacked, crossed = _stack(config, "stacked", crossed)
        self.parallel, deep = _stack(config, "parallel", width)
        joined = (crossed if self.cross else 0) + (deep if self.parallel else 0)
        self.final, joined = _stack(config, "final", joined)
        self.head = nn.Linear(joined, 1, bias=False) if config["head"] else None
        self.wide_dense = nn.Parameter(torch.zeros(num_dense)) if config["wide_dense"] else None
        self.bias = nn.Parameter(torch.zeros(1)) if config["bias"] else None

    def forward(self, dense_BD: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logit, shape (B,), of dense inputs and one tensor (B, N_f) per feature."""
        vectors = [v[:, :-1] if i in self.wide else v for i, v in enumerate(pooled)]
        logit_B1 = torch.zeros_like(pooled[0][:, :1])
        for i in self.wide:
            logit_B1 = logit_B1 + pooled[i][:, -1:]
        if self.wide_dense is not None:
            logit_B1 = logit_B1 + (dense_BD * self.wide_dense).sum(dim=1, keepdim=True)
        if self.fm:
            logit_B1 = logit_B1 + _pair_up([vectors[i] for i in self.fm])
        if self.head is not None:
            logit_B1 = logit_B1 + self.head(self._join(self._input(dense_BD, vectors)))
        if self.bias is not None:
            logit_B1 = logit_B1 + self.bias
        return logit_B1.squeeze(1)

    def _input(self, dense_BD: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        parts = []
        for kind, index, *_ in self.inputs:
            if kind == "feature":
                parts.append(vectors[index])
                continue
            column_B1 = dense_BD[:, index : index + 1]
            scaled = kind == "scaled"
            parts.append(column_B1 * self.scales[str(index)] if scaled else column_B1)
        return torch.cat(parts, dim=1)

    def _join(self, x_BM: Tensor) -> Tensor:
        parts = []
        if self.cross is not None:
            crossed = self.cross(x_BM if self.backbone is None else self.backbone(x_BM))
            parts.append(crossed if self.stacked is None else self.stacked(crossed))
        if self.parallel is not None:
            parts.append(self.parallel(x_BM))
        joined = torch.cat(parts, dim=1)
        return joined if self.final is None else self.final(joined)


def _stack(config: Mapping[str, Any], name: str, width: int) -> tuple[Stack | None, int]:
    """Build a stack, if there is one, and return the width behind it."""
    if not config[name]:
        return None, width
    stack = Stack(config[name], width)
    return stack, stack.width


def _pair_up(vectors: Sequence[Tensor]) -> Tensor:
    """Sum the dot products of all pairs, shape (B, 1). Source: Rendle 2010, lemma 3.1."""
    stacked_BFN = torch.stack(list(vectors), dim=1)
    square_of_sum = stacked_BFN.sum(dim=1) ** 2
    sum_of_squares = (stacked_BFN**2).sum(dim=1)
    return 0.5 * (square_of_sum - sum_of_squares).sum(dim=1, keepdim=True)
