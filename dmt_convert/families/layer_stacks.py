"""Stacks of layers as trainers store them, and columns of layers in another order than ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.spec import MlpSpec

ACTIVATIONS: Final = (
    "linear",
    "relu",
    "sigmoid",
    "tanh",
    "gelu",
    "silu",
    "elu",
    "leakyrelu",
    "softplus",
    "prelu",
)
"""Activations that networks know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """What a trainer calls the parts of a layer."""

    linear: str
    """Stem of the linear layer's weight and bias."""
    norm: str = ""
    """Stem of the batch norm's or layer norm's tensors; empty without a norm."""
    slope: str = ""
    """Name of a PReLU's weight; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a stack: linear, then perhaps a norm, then an activation."""

    fan_in: int
    """Input width."""
    fan_out: int
    """Output width."""
    tensors: Mapping[str, TensorInfo]
    """Name within the layer (`linear.weight`, `norm.mean`, `slope`, ...) -> tensor."""
    activation: str = "linear"
    """One of `ACTIVATIONS`."""
    norm: Literal["batch", "layer"] | None = None
    """Kind of the norm."""
    slopes: int = 0
    """PReLU only: number of slopes if there is one per output; 0 if all outputs share one."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer of an `MlpSpec`: linear with a bias, then ReLU."""
        return self.activation == "relu" and self.norm is None and "linear.bias" in self.tensors

    @property
    def config(self) -> dict[str, Any]:
        """The layer as a network's factory wants it; see `dmt_convert.model.networks.layers`."""
        return {
            "in": self.fan_in,
            "out": self.fan_out,
            "bias": "linear.bias" in self.tensors,
            "activation": self.activation,
            **({"slopes": self.slopes} if self.slopes else {}),
            "norm": self.norm,
        }


def mlp_of(layers: Sequence[Layer], *, final_relu: bool) -> MlpSpec:
    """Describe plain layers as an MLP."""
    widths = (layers[0].fan_in, *(layer.fan_out for layer in layers))
    return MlpSpec(widths=widths, final_relu=final_relu)


def cat_columns(widths: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Return their column of each of our columns [dense, features]."""
    starts, begin = {}, 0
    for place, i in sorted((place, i) for i, place in enumerate(theirs)):
        starts[place] = begin
        begin += widths[i]
    return [
        starts[place] + column
        for width, place in zip(widths, theirs, strict=True)
        for column in range(width)
    ]


def dot_columns(widths: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Return their column [pairs, dense] of each of our columns [dense, pairs]."""
    pairs = [(i, j) for i in range(len(theirs)) for j in range(i + 1, len(theirs))]
    number = {pair: k for k, pair in enumerate(pairs)}
    columns = [len(pairs) + i for i in range(widths[0])]
    for i, j in pairs:
        columns.append(number[min(theirs[i], theirs[j]), max(theirs[i], theirs[j])])
    return columns
