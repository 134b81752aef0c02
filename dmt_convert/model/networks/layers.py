"""Parts that networks are made of. Letters: B batch, M width, E experts, R rank.

A stack is described by a list of layers, each `{"in": 8, "out": 4, "bias": true, "norm": "batch",
"activation": "relu"}`; norm is `batch`, `layer` or null. A `prelu` has one slope, or one for each
output: `slopes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmt_convert.errors import ArchitectureError
from dmt_convert.model.layers import CrossNet, LowRankCross

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "leakyrelu": functional.leaky_relu,
    "softplus": functional.softplus,
}
"""Activations without weights; `prelu` has one."""


class BatchNorm(nn.Module):
    """Batch normalisation with the statistics that training left behind.

    They stay as they are, in fine-tuning too: a rank sees too small a share of a batch to
    estimate them anew.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, M)."""
        return functional.batch_norm(x_BM, self.mean, self.var, self.weight, self.bias)


class Layer(nn.Module):
    """A linear layer, a norm if the config names one, and an activation."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fan_in, fan_out, kind = config["in"], config["out"], config["activation"]
        self.linear = nn.Linear(fan_in, fan_out, bias=config["bias"])
        norms = {"batch": BatchNorm, "layer": nn.LayerNorm}
        self.norm = norms[config["norm"]](fan_out) if config["norm"] else None
        slopes = torch.full((config.get("slopes", 1),), 0.25)
        self.slope = nn.Parameter(slopes) if kind == "prelu" else None
        if kind != "prelu" and kind not in ACTIVATIONS:
            raise ArchitectureError(
                f"the activation {kind!r}",
                expected="one of " + ", ".join((*ACTIVATIONS, "prelu")),
                hint="a model with another activation cannot be converted",
            )
        self.activation = kind

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in) to (B, out)."""
        x = self.linear(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.slope is not None:
            return functional.prelu(x, self.slope)
        return ACTIVATIONS[self.activation](x)


class Stack(nn.ModuleList):
    """Layers one behind the other."""

    def __init__(self, layers: Sequence[Mapping[str, Any]], width: int) -> None:
        widths = [width, *(layer["out"] for layer in layers)]
        if [layer["in"] for layer in layers] != widths[:-1]:
            raise ArchitectureError(
                f"layers that take {[layer['in'] for layer in layers]} inputs",
                expected=f"layers that take {widths[:-1]}, what stands before them gives",
                hint="check that the checkpoint was saved whole",
            )
        super().__init__(Layer(layer) for layer in layers)
        self.width = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width of the inputs) to (B, width)."""
        for layer in self:
            x = layer(x)
        return x


class VectorCross(nn.Module):
    """A cross layer of DCN: x0 (w . x) + b + x. Source: arXiv 1708.05123, equation 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BM: Tensor, x_BM: Tensor) -> Tensor:
        """Cross (B, M) with (B, M)."""
        scale_B1 = functional.linear(x_BM, self.weight.unsqueeze(0))
        return x0_BM * scale_B1 + self.bias + x_BM


class MatrixCross(nn.Module):
    """A cross layer of DCNv2: x0 * (W x + b) + x. Source: arXiv 2008.13535, equation 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BM: Tensor, x_BM: Tensor) -> Tensor:
        """Cross (B, M) with (B, M)."""
        return x0_BM * functional.linear(x_BM, self.weight, self.bias) + x_BM


class MixCross(nn.Module):
    """Experts in low rank, weighed by gates. Source: arXiv 2008.13535, equations 3 to 5."""

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(experts, width, rank) / rank**0.5)
        self.v = nn.Parameter(torch.randn(experts, width, rank) / width**0.5)
        self.c = nn.Parameter(torch.randn(experts, rank, rank) / rank**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BM: Tensor, x_BM: Tensor, gates_EM: Tensor) -> Tensor:
        """Cross (B, M) with (B, M); gates_EM has a row per expert."""
        shares_BE = torch.softmax(functional.linear(x_BM, gates_EM), dim=1)
        mixed_BM = torch.zeros_like(x_BM)
        for e in range(len(self.u)):
            inner_BR = torch.tanh(x_BM @ self.v[e])
            inner_BR = torch.tanh(functional.linear(inner_BR, self.c[e]))
            expert_BM = functional.linear(inner_BR, self.u[e], self.bias)
            mixed_BM = mixed_BM + shares_BE[:, e : e + 1] * expert_BM
        return x0_BM * mixed_BM + x_BM


class CrossStack(nn.Module):
    """Cross layers of one kind.

    Args:
        config: `{"kind": "vector" | "matrix" | "low-rank" | "mix", "layers": 2}`, for the last two
            also `rank`, for the last `experts`.
        width: M.
    """

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        kind, rank = config["kind"], config.get("rank", 0)
        make: Mapping[str, Callable[[], nn.Module]] = {
            "mix": lambda: MixCross(width, rank, config["experts"]),
            "low-rank": lambda: LowRankCross(width, rank),
            "vector": lambda: VectorCross(width),
            "matrix": lambda: MatrixCross(width),
        }
        self.layers = CrossNet(make[kind]() for _ in range(config["layers"]))
        gates = torch.zeros(config["experts"], width) if kind == "mix" else None
        self.gates = None if gates is None else nn.Parameter(gates)

    def forward(self, x0_BM: Tensor) -> Tensor:
        """Map (B, M) to (B, M)."""
        shared = () if self.gates is None else (self.gates,)
        crossed: Tensor = self.layers(x0_BM, *shared)
        return crossed
