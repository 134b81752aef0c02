"""The graphs of an export as torch modules: both pt2 and ONNX are traced from these.

Each takes named tensors one after the other. ONNX takes its look-ups from elsewhere: of these
modules it needs what is behind them.

Letters: B batch, D dense inputs, L ids per bag, O tower output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from dmt_convert.errors import ExportError
from dmt_convert.model import Code, CodedModule, DmtModel, DmtSpec, state_name
from dmt_convert.serving.columns import Columns, keep_values
from dmt_convert.serving.export_manifest import list_sent
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.pt2_lookup import TowerLookup, refuse_wrong

BATCH: Final = "B"
_DTYPES: Final = {"int64": torch.int64, "float32": torch.float32, "uint8": torch.uint8}
_TRACED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """One tensor that a graph takes."""

    name: str
    """Its name."""
    dtype: str
    """int64, float32 or uint8."""
    shape: tuple[str | int, ...]
    """Its dims: a number, or a name for one that a request chooses (`B`, the batch, is shared)."""

    @property
    def once(self) -> bool:
        """Whether it has one row, whatever the batch."""
        return self.shape[0] == 1

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
        shape = (f"{form.feature}.nnz",) if form.form == "jagged" else (BATCH, width)
        found.append(TensorInput(name=form.ids, dtype="int64", shape=shape))
        if form.lengths is not None:
            found.append(TensorInput(name=form.lengths, dtype="int64", shape=(BATCH,)))
        if form.weights is not None:
            found.append(TensorInput(name=form.weights, dtype="float32", shape=shape))
    return tuple(found)


def dense_input(inputs: GraphInputs) -> tuple[TensorInput, ...]:
    """Return the dense input, shape (B, D) or (1, D), if there is one."""
    if not inputs.num_dense:
        return ()
    rows = 1 if inputs.dense_per_request else BATCH
    return (TensorInput(name=inputs.dense, dtype="float32", shape=(rows, inputs.num_dense)),)


def list_over_arch_inputs(spec: DmtSpec, inputs: GraphInputs) -> tuple[TensorInput, ...]:
    """List the tensors that the over_arch graph takes: dense inputs, and the towers' outputs.

    With request batching, those that come once per request have one row.

    Raises:
        ExportError: A tower mixes features of both sides, or nothing comes per candidate.
    """
    once = towers_per_request(spec, inputs)
    towers = [
        TensorInput(name=sent.part, dtype=sent.dtype, shape=(1 if once[t] else BATCH, sent.columns))
        for t, sent in enumerate(list_sent(spec))
    ]
    return (*dense_input(inputs), *towers)


def towers_per_request(spec: DmtSpec, inputs: GraphInputs) -> tuple[bool, ...]:
    """Tell which towers run once per request.

    Raises:
        ExportError: A tower mixes features of both sides, or nothing comes per candidate.
    """
    user = set(inputs.per_request)
    if not user:
        return (False,) * len(spec.towers)
    mixed = [
        f"tower {t}: {', '.join(sorted(user & set(tower.features)))} with "
        f"{', '.join(sorted(set(tower.features) - user))}"
        for t, tower in enumerate(spec.towers)
        if user & set(tower.features) and not user >= set(tower.features)
    ]
    if mixed:
        raise ExportError(
            "towers mix features that come once per request with others",
            expected="towers whose features all come once per request, or all per candidate",
            hint="convert with --group user=f1,f2 --group item=f3,f4, and name every feature",
            details=mixed,
        )
    once = tuple(user >= set(tower.features) for tower in spec.towers)
    if all(once) and (inputs.dense_per_request or not inputs.num_dense):
        raise ExportError(
            "every input comes once per request",
            expected="some inputs that differ between candidates",
            hint="name fewer features, or omit --dense-per-request",
        )
    return once


class Sender(nn.Module):
    """A tower's module, and the form in which what it emits leaves the tower's graph.

    Args:
        tower_module: The module.
    """

    def __init__(self, tower_module: nn.Module) -> None:
        super().__init__()
        self.tower_module = tower_module

    def forward(self, pooled_BM: Tensor) -> Tensor:
        """Return packed levels, uint8, if the tower has such a code; else what it emits."""
        module = self.tower_module
        if isinstance(module, CodedModule) and module.code is not None and module.code.packs:
            return module.code.pack(module.emit(pooled_BM))
        emitted: Tensor = module(pooled_BM)
        return emitted


class TowerGraph(Sender):
    """Ids of one tower's features to what it sends, shape (B, O).

    Args:
        lookup: Its tables.
        tower_module: Its module.
        inputs: What it takes, in order.
    """

    def __init__(
        self, lookup: TowerLookup, tower_module: nn.Module, inputs: Sequence[TensorInput]
    ) -> None:
        super().__init__(tower_module)
        self.lookup = lookup
        self.inputs = tuple(inputs)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the tower's output."""
        feeds = {entry.name: tensor for entry, tensor in zip(self.inputs, tensors, strict=True)}
        sent, wrong = self.send(feeds)
        refuse_wrong(wrong)
        return sent

    def send(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the tower's output, and whether something was wrong."""
        pooled_BM, wrong = self.lookup(feeds)
        return super().forward(pooled_BM), wrong


class OverArchGraph(nn.Module):
    """Dense inputs and the towers' outputs to logits, shape (B, 1).

    Args:
        model: The model; its towers are left out.
        inputs: What it takes, in order, the dense inputs first if there are any.
    """

    def __init__(self, model: DmtModel, inputs: Sequence[TensorInput]) -> None:
        super().__init__()
        codes = [getattr(tower.tower_module, "code", None) for tower in model.tower_list]
        self.codes = nn.ModuleList(
            deepcopy(code) if isinstance(code, Code) and code.packs else nn.Identity()
            for code in codes
        )
        model.towers = nn.ModuleList()
        self.model = model
        self.inputs = tuple(inputs)
        self.num_dense = model.spec.flat.num_dense
        network = getattr(model.interaction, "network", None)
        others = set() if network is None else {*network.modules()}
        for module in {*model.modules()} - others:
            _keep_indices(module)
        if network is not None:  # code of others, which takes tensors
            network.register_forward_pre_hook(lambda _, args: _as_tensors(args))

    @staticmethod
    def weight_name(name: str) -> str:
        """Name in the state dict of a tensor that is outside towers.

        Args:
            name: What a bundle calls it.
        """
        return f"model.{state_name(name)}"

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return logits."""
        pairs = list(zip(self.inputs, tensors, strict=True))
        batch = next(tensor.shape[0] for entry, tensor in pairs if not entry.once)
        if self.num_dense:
            (entry, tensor), *pairs = pairs
            dense = Columns.of(batch, tensor, once=entry.once)
        else:
            dense = Columns.of(batch, torch.zeros(batch, 0, device=tensors[0].device))
        emitted = [
            Columns.of(
                batch,
                code.unpack(tensor) if isinstance(code, Code) else tensor,
                once=entry.once,
            )
            for code, (entry, tensor) in zip(self.codes, pairs, strict=True)
        ]
        logits_B: Tensor = self.model.forward_emitted(
            dense,  # type: ignore[arg-type]
            Columns.cat(emitted),  # type: ignore[arg-type]
        )
        return logits_B.unsqueeze(1)


class WholeGraph(nn.Module):
    """All inputs to logits, shape (B, 1).

    Args:
        towers: The tower graphs.
        over_arch: The over_arch graph.
        inputs: What it takes, in order, the dense inputs first if there are any.
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
        sent: list[Tensor] = []
        wrong: list[Tensor] = []
        for tower in self.towers:
            assert isinstance(tower, TowerGraph)
            output, found = tower.send(feeds)
            sent.append(output)
            wrong += found
        refuse_wrong(wrong)
        dense = tensors[:1] if self.over_arch.num_dense else ()
        logits: Tensor = self.over_arch(*dense, *sent)
        return logits


Graph = TowerGraph | OverArchGraph | WholeGraph


def _keep_indices(module: nn.Module) -> None:
    """Make plain attributes of index buffers that are not stored: `Columns` looks at their values.

    A tracer replaces buffers by stand-ins.
    """
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name in module._non_persistent_buffers_set and buffer.dtype == torch.int64:
            keep_values(buffer)
            delattr(module, name)
            setattr(module, name, buffer)


def _as_tensors(values: Any) -> Any:
    """Join the columns that a module was given."""
    if isinstance(values, Columns):
        return values.joined()
    if isinstance(values, list | tuple):
        return type(values)(map(_as_tensors, values))
    return values
