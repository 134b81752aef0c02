"""Networks that are a list of layers between named tensors, as HugeCTR describes its models.

Letters: B batch, D dense inputs, S slots, N embedding dim, M width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmt_convert.errors import ConfigError
from dmt_convert.model.networks.layers import VectorCross

_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "ReLU": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Dropout": lambda x: x,
}
"""Layers without settings; dropout is a matter of training."""
_TYPES: Final = (
    "Add",
    "Concat",
    "ELU",
    "ElementwiseMultiply",
    "FmOrder2",
    "FusedInnerProduct",
    "InnerProduct",
    "Interaction",
    "MultiCross",
    "ReduceSum",
    "Reshape",
    "Slice",
    "Sub",
    "WeightMultiply",
    *_ACTIVATIONS,
)


class _Scale(nn.Module):
    """Each of S numbers times a vector of its own."""

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(slots, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map S numbers to S N."""
        return (x.flatten(1).unsqueeze(2) * self.weight).flatten(1)


class LayerGraph(nn.Module):
    """Runs layers one after the other; each reads tensors by name and writes one or more.

    Args:
        config: `dense`, the name of the dense inputs; `embeddings`, a list of `[name, first
            feature, S]`; `layers`, each with `type`, `bottom` and `top` (lists of names), and the
            type's own keys; `output`, the name of the logit.
        dims: Embedding dims N_f of the features.
        num_dense: D.

    Raises:
        ConfigError: A layer is of a type that is not known.
    """

    def __init__(self, config: Mapping[str, Any], dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.dense, self.output = config["dense"], config["output"]
        self.embeddings = [tuple(entry) for entry in config["embeddings"]]
        self.steps = [dict(layer) for layer in config["layers"]]
        self.layers = nn.ModuleDict()
        for i, layer in enumerate(self.steps):
            module = _make(layer)
            if module is not None:
                self.layers[str(i)] = module

    def forward(self, dense_BD: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logit, shape (B,), of dense inputs and one tensor (B, N_f) per feature."""
        values = {self.dense: dense_BD}
        for name, first, slots in self.embeddings:
            values[name] = torch.stack(list(pooled[first : first + slots]), dim=1)
        for i, layer in enumerate(self.steps):
            inputs = [values[name] for name in layer["bottom"]]
            key = str(i)
            module = self.layers[key] if key in self.layers else None  # noqa: SIM401
            if layer["type"] == "Slice":
                for top, (begin, end) in zip(layer["top"], layer["ranges"], strict=True):
                    values[top] = inputs[0][:, begin:end]
            else:
                values[layer["top"][0]] = _run(layer, module, inputs)
        return values[self.output].reshape(-1)


def _make(layer: Mapping[str, Any]) -> nn.Module | None:
    """Build the module that holds a layer's weights; None if it has none.

    Raises:
        ConfigError: The type of layer is unknown.
    """
    kind = layer["type"]
    if kind not in _TYPES:
        raise ConfigError(
            f"the model's dense part has a layer of type {kind!r}",
            expected="one of " + ", ".join(_TYPES),
            hint="use the version of dmt-convert that wrote the bundle, or a newer one",
        )
    if kind in ("InnerProduct", "FusedInnerProduct"):
        return nn.Linear(layer["in"], layer["out"])
    if kind == "MultiCross":
        return nn.ModuleList(VectorCross(layer["in"]) for _ in range(layer["layers"]))
    if kind == "WeightMultiply":
        return _Scale(layer["slots"], layer["dim"])
    return None


def _run(layer: Mapping[str, Any], module: nn.Module | None, inputs: Sequence[Tensor]) -> Tensor:
    kind, x = layer["type"], inputs[0]
    if kind == "FusedInnerProduct" and module is not None:
        return torch.relu(module(x))
    if kind == "MultiCross" and module is not None:
        crossed = x
        for cross in module.children():
            crossed = cross(x, crossed)
        return crossed
    if kind in ("InnerProduct", "WeightMultiply") and module is not None:
        return module(x)  # type: ignore[no-any-return]
    if kind == "Interaction":
        return _interact(x, inputs[1])
    if kind == "Reshape":
        if "selected" in layer:
            x = x[:, layer["selected"]]
        return x.flatten(1)
    if kind == "Concat":
        return torch.cat(list(inputs), dim=-1)
    if kind == "FmOrder2":
        slots = x.reshape(x.shape[0], -1, layer["dim"])
        return 0.5 * (slots.sum(dim=1) ** 2 - (slots**2).sum(dim=1))
    if kind == "ReduceSum":
        return x.sum(dim=1, keepdim=True)
    if kind in ("Add", "Sub", "ElementwiseMultiply"):
        return _combine(kind, inputs)
    if kind == "ELU":
        return functional.elu(x, alpha=layer["alpha"])
    return _ACTIVATIONS[kind](x)


def _combine(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    out = inputs[0]
    for other in inputs[1:]:
        out = out + other if kind == "Add" else out - other if kind == "Sub" else out * other
    return out


def _interact(dense_BN: Tensor, embeddings_BSN: Tensor) -> Tensor:
    """Return [dense, pairs of the lower triangle row by row, one zero]."""
    vectors = torch.cat((dense_BN.unsqueeze(1), embeddings_BSN), dim=1)
    count = vectors.shape[1]
    rows, columns = torch.tril_indices(count, count, -1, device=dense_BN.device)
    gram = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
    pairs = gram.index_select(1, rows * count + columns)
    return torch.cat((dense_BN, pairs, torch.zeros_like(dense_BN[:, :1])), dim=1)
