"""The graphs of an export as torch modules that take named tensors one after the other.

Letters: B batch, D dense inputs, L ids per bag, O tower output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from dmt_convert.model import DmtModel, DmtSpec
from dmt_convert.serving.export_manifest import tower_name
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.pt2_lookup import TowerLookup, refuse_wrong

_DTYPES: Final = {"int64": torch.int64, "float32": torch.float32}
_TRACED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """One tensor that a graph takes."""

    name: str
    """Its name."""
    dtype: str
    """int64 or float32."""
    shape: tuple[str | int, ...]
    """Its dims: a number, or a name for one that a request chooses (`B`, the batch, is shared)."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def traced(
    inputs: Sequence[TensorInput], device: str
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return what torch.export traces a graph with: zeros, and which of their dims are free.

    No two dims have one size by chance, and none has 0 or 1, which torch would take for fixed.
    """
    names = dict.fromkeys(d for entry in inputs for d in entry.shape if isinstance(d, str))
    sizes = {name: _TRACED + i for i, name in enumerate(names)}
    dims = {name: torch.export.Dim(f"d{i}") for i, name in enumerate(names)}
    zeros = [
        torch.zeros(
            [sizes[d] if isinstance(d, str) else d for d in entry.shape],
            dtype=_DTYPES[entry.dtype],
            device=device,
        )
        for entry in inputs
    ]
    free = [
        {i: dims[d] for i, d in enumerate(entry.shape) if isinstance(d, str)} for entry in inputs
    ]
    return tuple(zeros), tuple(free)


def list_inputs(inputs: GraphInputs, features: Sequence[str] | None) -> tuple[TensorInput, ...]:
    """List the tensors of some features; of all, and the dense inputs, for None."""
    found = list(dense_input(inputs)) if features is None else []
    for form in inputs.features:
        if features is not None and form.feature not in features:
            continue
        width: str | int = 1 if form.form == "single" else f"{form.feature}.L"
        shape = (f"{form.feature}.nnz",) if form.form == "jagged" else ("B", width)
        found.append(TensorInput(name=form.ids, dtype="int64", shape=shape))
        if form.lengths is not None:
            found.append(TensorInput(name=form.lengths, dtype="int64", shape=("B",)))
        if form.weights is not None:
            found.append(TensorInput(name=form.weights, dtype="float32", shape=shape))
    return tuple(found)


def dense_input(inputs: GraphInputs) -> tuple[TensorInput, ...]:
    """Return the dense input, shape (B, D), if there is one."""
    if not inputs.num_dense:
        return ()
    return (TensorInput(name=inputs.dense, dtype="float32", shape=("B", inputs.num_dense)),)


def list_over_arch_inputs(spec: DmtSpec, inputs: GraphInputs) -> tuple[TensorInput, ...]:
    """List the tensors that the over_arch graph takes."""
    towers = [
        TensorInput(name=tower_name(t), dtype="float32", shape=("B", width))
        for t, width in enumerate(spec.tower_widths)
    ]
    return (*dense_input(inputs), *towers)


class TowerGraph(nn.Module):
    """Ids of one tower's features to what it emits, shape (B, O).

    Args:
        lookup: Its tables.
        tower_module: Its module.
        inputs: What it takes, in order.
    """

    def __init__(
        self, lookup: TowerLookup, tower_module: nn.Module, inputs: Sequence[TensorInput]
    ) -> None:
        super().__init__()
        self.lookup = lookup
        self.tower_module = tower_module
        self.inputs = tuple(inputs)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the tower's output."""
        feeds = {entry.name: tensor for entry, tensor in zip(self.inputs, tensors, strict=True)}
        emitted, wrong = self.emit(feeds)
        refuse_wrong(wrong)
        return emitted

    def emit(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the tower's output, and whether something was wrong."""
        pooled_BM, wrong = self.lookup(feeds)
        return self.tower_module(pooled_BM), wrong


class OverArchGraph(nn.Module):
    """Dense inputs and the towers' outputs to logits, shape (B, 1).

    Args:
        model: The model; its towers are not used.
        inputs: What it takes, in order.
    """

    def __init__(self, model: DmtModel, inputs: Sequence[TensorInput]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.num_dense = model.spec.flat.num_dense

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return logits."""
        if self.num_dense:
            dense_BD, *emitted = tensors
        else:
            dense_BD, emitted = tensors[0][:, :0], list(tensors)
        logits_B: Tensor = self.model.forward_emitted(dense_BD, torch.cat(emitted, dim=1))
        return logits_B.unsqueeze(1)


class WholeGraph(nn.Module):
    """All inputs to logits, shape (B, 1).

    Args:
        towers: The tower graphs.
        over_arch: The over_arch graph.
        inputs: What it takes, in order, the dense inputs first where there are any.
    """

    def __init__(
        self,
        towers: Sequence[TowerGraph],
        over_arch: OverArchGraph,
        inputs: Sequence[TensorInput],
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.over_arch = over_arch
        self.inputs = tuple(inputs)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return logits."""
        feeds = {entry.name: tensor for entry, tensor in zip(self.inputs, tensors, strict=True)}
        emitted: list[Tensor] = []
        wrong: list[Tensor] = []
        for tower in self.towers:
            assert isinstance(tower, TowerGraph)
            output, found = tower.emit(feeds)
            emitted.append(output)
            wrong += found
        refuse_wrong(wrong)
        dense = tensors[:1] if self.over_arch.num_dense else ()
        logits: Tensor = self.over_arch(*dense, *emitted)
        return logits


Graph = TowerGraph | OverArchGraph | WholeGraph
