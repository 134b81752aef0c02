"""The dense parts of a model in ONNX graphs: torch's own exporter writes the nodes.

All parts of an export (the head and one tower module of every kind and shape) are traced as one
program, because the exporter takes seconds however little it is given. Their weights are inputs of
that program, so that none is read, and every node finds its weights by name: in our graphs they are
tensors of the export's `.safetensors` files.

Letters: B batch, M widths' sum of a tower, O output of a tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dmt_convert.arrays import AnyArray
from dmt_convert.checkpoint import read_tensor
from dmt_convert.errors import DmtError, ExportError
from dmt_convert.model import DmtModel, TowerModuleSpec, as_state, build_tower_module
from dmt_convert.serving.export_manifest import CODE_PREFIX
from dmt_convert.serving.exporter import ExportJob
from dmt_convert.serving.graphs import (
    BATCH,
    OverArchGraph,
    Sender,
    TensorInput,
    list_over_arch_inputs,
    traced,
)
from dmt_convert.serving.onnx_graph import OPSET, GraphBuilder
from dmt_convert.torch_messages import hushed

_Shape = tuple[TowerModuleSpec, tuple[int, ...]]


class DenseNodes:
    """The dense parts of an export, as nodes to be added to any of its graphs.

    Args:
        job: What is exported.
    """

    def __init__(self, job: ExportJob) -> None:
        self._job = job
        self._shapes: list[_Shape] = [
            (tower.module, tuple(job.spec.tower_dims(t))) for t, tower in enumerate(job.spec.towers)
        ]

    def passes_on(self, tower: int) -> bool:
        """Tell whether a tower sends its pooled embeddings as they are."""
        return not self._nodes[self._shapes[tower]].nodes

    def add_tower(self, graph: GraphBuilder, tower: int, pooled: str, output: str) -> None:
        """Apply the module of a tower: (B, M) to what it sends.

        Args:
            graph: The graph.
            tower: Which tower.
            pooled: Its pooled embeddings, in its order.
            output: Name of what it sends.

        Raises:
            ExportError: torch cannot write a dense part of the model as a graph.
        """
        file = self._job.weights.towers[tower]
        nodes = self._nodes[self._shapes[tower]]
        weights = {name: partial(graph.weight, file, name) for name in nodes.weights}
        nodes.add(graph, weights, [pooled], output)

    def add_head(
        self, graph: GraphBuilder, dense: str | None, sent: Sequence[str], output: str
    ) -> None:
        """Add everything behind the towers: logits, (B, 1).

        Args:
            graph: The graph.
            dense: The dense inputs, if there are any.
            sent: What every tower sends, B rows, or one if it runs once per request.
            output: Name of the logits.

        Raises:
            ExportError: torch cannot write a dense part of the model as a graph.
        """
        file = self._job.weights.over_arch
        weights = {
            OverArchGraph.weight_name(name): partial(graph.weight, file, name)
            for name in file.tensors
        }
        weights |= {
            name: partial(graph.floats, name, values) for name, values in self._ranges.items()
        }
        self._nodes[None].add(graph, weights, [*([] if dense is None else [dense]), *sent], output)

    @cached_property
    def _ranges(self) -> Mapping[str, AnyArray]:
        """Ranges of the towers' codes, by their names in the head: constants of its graphs."""
        return {
            f"codes.{t}.{name.removeprefix(CODE_PREFIX)}": read_tensor(info)
            for t, file in enumerate(self._job.weights.towers)
            for name, info in file.tensors.items()
            if name.startswith(CODE_PREFIX)
        }

    @cached_property
    def _nodes(self) -> Mapping[_Shape | None, _PartNodes]:
        """The nodes of every part; the head is None."""
        job = self._job
        parts: dict[_Shape | None, _Part] = {}
        for shape in dict.fromkeys(self._shapes):
            with torch.device("meta"):
                module = Sender(build_tower_module(*shape))
            entry = TensorInput(name="pooled", dtype="float32", shape=(BATCH, sum(shape[1])))
            parts[shape] = _Part(module, (entry,), {})
        with torch.device("meta"):
            model = DmtModel(job.spec, [nn.Identity() for _ in job.spec.towers])
        head = OverArchGraph(model, list_over_arch_inputs(job.spec, job.inputs))
        integers = _integers(head, job)
        parts[None] = _Part(head, head.inputs, integers)
        network = job.spec.flat.interaction.network
        structure = _Structure(
            model=json.dumps(job.spec.to_json(), sort_keys=True),
            inputs=head.inputs,
            integers=tuple((name, value.numpy().tobytes()) for name, value in integers.items()),
            what="dense part" if network is None else f"network {network.file or network.name}",
            parts=tuple(parts.values()),
        )
        return dict(zip(parts, trace_parts(structure), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structure:
    """All that the nodes of a model's dense parts depend on; weights are not among it."""

    model: str
    """The converted model as JSON."""
    inputs: tuple[TensorInput, ...]
    """What the head takes."""
    integers: tuple[tuple[str, bytes], ...]
    """Its tensors that are not float32."""
    what: str = field(compare=False)
    """What to call the parts in errors."""
    parts: tuple[_Part, ...] = field(compare=False)
    """The parts."""


@lru_cache(maxsize=8)
def trace_parts(structure: _Structure) -> tuple[_PartNodes, ...]:
    """Return the nodes of all parts; kept for further exports of such a model."""
    with _explained(structure.what):
        model = _export(structure.parts)
    _check_operators(model, structure.what)
    return tuple(_take_apart(model, structure.parts))


class _Part:
    """A module to be traced.

    Args:
        module: The module.
        inputs: What it takes.
        fixed: Those of its tensors that are not float32, by name: they are kept in the graph.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[TensorInput], fixed: Mapping[str, Tensor]
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.inputs = tuple(inputs)
        state = module.state_dict()
        self.weights = {
            name: torch.empty(v.shape) for name, v in state.items() if name not in fixed
        }
        module.load_state_dict(fixed, strict=False, assign=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartNodes:
    """What torch's exporter made of a module."""

    nodes: tuple[onnx.NodeProto, ...]
    """Its nodes, in order."""
    constants: tuple[onnx.TensorProto, ...]
    """Tensors that the nodes use, beside weights."""
    weights: Mapping[str, str]
    """Name in the module's state dict -> name that the nodes use."""
    inputs: tuple[str, ...]
    """Names that the nodes use for what the module takes."""
    output: str
    """Name of what it gives."""

    def add(
        self,
        graph: GraphBuilder,
        weights: Mapping[str, Callable[[], str]],
        tensors: Sequence[str],
        output: str,
    ) -> None:
        """Add the nodes to a graph.

        Args:
            graph: The graph.
            weights: Name in the module's state dict -> adds the tensor to the graph.
            tensors: What the module takes.
            output: What to call what it gives.
        """
        known = dict(zip(self.inputs, tensors, strict=True))
        used = {name for node in self.nodes for name in node.input}
        for weight, name in self.weights.items():
            if name in used:
                known[name] = weights[weight]()
        for constant in self.constants:
            known[constant.name] = graph.constant(constant.name, numpy_helper.to_array(constant))
        if not self.nodes:
            graph.node("Identity", known[self.output], name="passed_on", output=output)
        with graph.scope("dense"):
            graph.merge(self.nodes, known, {self.output: output})


class _Program(nn.Module):
    """All parts beside each other; their weights are inputs."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        super().__init__()
        self._parts = tuple(parts)  # no modules: what they hold beside weights become constants

    def forward(
        self, weights: Sequence[Mapping[str, Tensor]], tensors: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, ...]:
        """Return what every part gives."""
        return tuple(
            torch.func.functional_call(part.module, dict(own), tuple(given), strict=False)
            for part, own, given in zip(self._parts, weights, tensors, strict=True)
        )


def _export(parts: Sequence[_Part]) -> onnx.ModelProto:
    """Let torch write all parts as one graph; its inputs are all weights, then all tensors."""
    # no dim is shared, or a part would take it from another one's tensors
    flat, free = traced(
        [
            replace(entry, shape=tuple(f"{d}{i}" if isinstance(d, str) else d for d in entry.shape))
            for i, part in enumerate(parts)
            for entry in part.inputs
        ],
        "cpu",
    )
    examples, dims = iter(flat), iter(free)
    with torch.no_grad(), hushed():
        program = torch.export.export(
            _Program(parts),
            (
                [part.weights for part in parts],
                [[next(examples) for _ in part.inputs] for part in parts],
            ),
            dynamic_shapes=(
                [dict.fromkeys(part.weights) for part in parts],
                [[next(dims) for _ in part.inputs] for part in parts],
            ),
            strict=False,
        )
        written = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert written is not None
    model: onnx.ModelProto = written.model_proto
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _take_apart(model: onnx.ModelProto, parts: Sequence[_Part]) -> Iterator[_PartNodes]:
    """Yield the nodes of every part: those that its output depends on."""
    names = iter([value.name for value in model.graph.input])
    weights = [{weight: next(names) for weight in part.weights} for part in parts]
    inputs = [tuple(next(names) for _ in part.inputs) for part in parts]
    assert next(names, None) is None
    for own, taken, output in zip(weights, inputs, model.graph.output, strict=True):
        wanted, nodes = {output.name}, []
        for node in reversed(model.graph.node):
            if wanted & {*node.output}:
                nodes.append(node)
                wanted |= _names_used(node) - {""}
        nodes = [node for node in reversed(nodes) if node.op_type != "Identity" or len(nodes) > 1]
        passed_on = not nodes
        yield _PartNodes(
            nodes=tuple(nodes),
            constants=tuple(t for t in model.graph.initializer if t.name in wanted),
            weights=own,
            inputs=taken,
            output=taken[0] if passed_on else output.name,
        )


def _names_used(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node takes, also inside its branches."""
    inner = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    names = {name for graph in inner for child in graph.node for name in _names_used(child)}
    names |= {value.name for graph in inner for value in graph.output}
    return {*node.input} | names


def _integers(head: OverArchGraph, job: ExportJob) -> dict[str, Tensor]:
    """Read the tensors of a network that are not float32: the values of indices matter."""
    own = {name: value for name, value in head.state_dict().items() if value.dtype != torch.float32}
    if not own:
        return {}
    names = {OverArchGraph.weight_name(name): name for name in job.weights.over_arch.tensors}
    return {
        name: as_state(np.asarray(read_tensor(job.weights.over_arch.weight(names[name]))), value)
        for name, value in own.items()
    }


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise what torch says of a model's code as an error that names the code."""
    try:
        yield
    except ImportError as error:
        raise ExportError(
            f"models cannot be exported to ONNX without {error.name}",
            hint="pip install onnxscript",
        ) from None
    except Exception as error:  # torch gives no narrower class
        # a user's network is run by code that blames it for whatever it raises
        cause = error.__cause__ if isinstance(error, DmtError) else error
        if isinstance(error, DmtError) and not type(cause).__module__.startswith("torch"):
            raise
        text = (str(cause).strip().splitlines() or [""])[0]
        raise ExportError(
            f"torch cannot write the {what} as a graph ({type(cause).__name__}: {text})",
            expected="a forward() without branches on values, for any number of rows",
            hint="change forward(): shapes may only depend on dense.shape[0]",
        ) from cause


def _check_operators(model: onnx.ModelProto, what: str) -> None:
    domains = {entry.domain: entry.version for entry in model.opset_import}
    used = {node.domain for node in model.graph.node}
    if domains.get("") != OPSET or used - {"", "ai.onnx"}:
        found = ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in domains.items())
        raise ExportError(
            f"torch wrote the {what} with operators of {found}",
            expected=f"ai.onnx {OPSET}",
            hint="use plainer operators in forward(), or export to pt2",
        )
