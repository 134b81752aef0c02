"""What a module computes behind its look-ups, as a graph of torch's own operators.

Letters: B batch.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dmt_convert.capture.lookups import Lookups, watched
from dmt_convert.capture.raw_inputs import Inputs
from dmt_convert.errors import ArchitectureError
from dmt_convert.torch_messages import hushed

_PREFIX: Final = "module."
"""What precedes the names of weights in the exported program."""
_CHECKS: Final = (
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
"""Operators that only make sure of something."""
_PACKAGE: Final = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A traced module."""

    graph: fx.Graph
    """Its operators."""
    raw: tuple[fx.Node, ...]
    """Placeholders of the tensors of its inputs."""
    looked: tuple[fx.Node | None, ...]
    """Placeholders of what each call looked up; None: a call that stays in the graph."""
    ids: tuple[fx.Node | None, ...]
    """What each call was called with, where it is a tensor."""
    logit: fx.Node
    """The output."""
    weights: dict[str, str]
    """Name of a placeholder -> name of a weight in the module."""
    values: dict[str, Tensor]
    """Weight -> its value."""
    is_parameter: dict[str, bool]
    """Weight -> whether it is a parameter."""


class _Behind(nn.Module):
    """A module whose look-ups are given."""

    def __init__(self, module: nn.Module, inputs: Inputs, lookups: Lookups) -> None:
        super().__init__()
        self.module = module
        self._inputs = (inputs, lookups)  # a tuple: neither is a module

    def forward(self, raw: list[Tensor], looked: list[Tensor | None]) -> Any:
        """Return the logit, and the ids of every call that is a tensor's."""
        inputs, lookups = self._inputs
        with watched(lookups, looked) as calls:
            output = inputs.call(self.module, raw)
        ids = [
            call.ids if given is not None and torch.is_tensor(call.ids) else None
            for call, given in zip(calls, looked, strict=True)
        ]
        return pick_logit(output), ids


def trace_module(
    module: nn.Module, inputs: Inputs, lookups: Lookups, looked: Sequence[Tensor | None]
) -> Trace:
    """Trace a module behind its look-ups.

    Args:
        module: The module, in eval mode.
        inputs: What it is called with.
        lookups: Its look-ups.
        looked: What every call looked up; None for calls that stay in the graph.

    Raises:
        ArchitectureError: torch cannot trace it, it draws at random, or it writes to its buffers.
    """
    batch = Dim("batch", min=1, max=1 << 20)
    dims = {
        "raw": [*_dims(inputs, batch)],
        "looked": [t if t is None else {0: batch} for t in looked],
    }
    behind = _Behind(module, inputs, lookups)
    with explained("torch cannot trace the module"), hushed(), sdpa_kernel(SDPBackend.MATH):
        try:
            program = _export(behind, inputs, looked, dims, deferred=False)
        except Exception as error:  # torch gives no narrower class
            if "data-dependent" in str(error):
                raise
            program = _export(behind, inputs, looked, dims, deferred=True)
        program = program.run_decompositions()
    return _take_apart(program, inputs, looked)


def _export(
    behind: _Behind,
    inputs: Inputs,
    looked: Sequence[Tensor | None],
    dims: dict[str, Any],
    *,
    deferred: bool,
) -> torch.export.ExportedProgram:
    return torch.export.export(
        behind,
        (inputs.tensors, list(looked)),
        dynamic_shapes=dims,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=deferred,
    )


def _dims(inputs: Inputs, batch: Any) -> Iterator[dict[int, Any]]:
    for i, entry in enumerate(inputs.raw):
        if entry.is_jagged:
            yield {0: Dim(f"ids_{i}", min=1)}
            count = len(entry.value.keys())
            yield {0: batch if count == 1 else count * batch}
        else:
            yield {0: batch}


def pick_logit(output: object) -> Tensor:
    """Return the one tensor of an output.

    Raises:
        ArchitectureError: There are several, none, or one of several columns.
    """
    found = [leaf for leaf in pytree.tree_leaves(output) if torch.is_tensor(leaf)]
    shapes = ", ".join(str(list(leaf.shape)) for leaf in found)
    columns = [1 if leaf.ndim < 2 else int(leaf.shape[1]) for leaf in found]
    if sum(columns) > 1:
        raise ArchitectureError(
            f"the module gives several logits: tensors of shapes {shapes}",
            expected="one logit per row, shape (B,) or (B, 1)",
            hint="models of several tasks cannot be captured yet; wrap the module in one that "
            "returns one of them",
        )
    if not found or found[0].ndim not in (1, 2) or not found[0].is_floating_point():
        raise ArchitectureError(
            f"the module gives {shapes or type(output).__name__}",
            expected="one logit per row, a float tensor of shape (B,) or (B, 1)",
            hint="return the logit, or a tuple or dict with nothing else",
        )
    return found[0]


def _take_apart(
    program: torch.export.ExportedProgram, inputs: Inputs, looked: Sequence[Tensor | None]
) -> Trace:
    signature, graph = program.graph_signature, program.graph_module.graph
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise ArchitectureError(
            "the module writes to "
            + ", ".join(name.removeprefix(_PREFIX) for name in written[:5])
            + " when it runs",
            expected="a module that in eval mode changes neither buffers nor inputs",
            hint="a bundle's dense part keeps no state",
        )
    _refuse_random(graph)
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    logit, *ids = outputs
    names = set(signature.user_inputs)
    given = [n for n in graph.nodes if n.op == "placeholder" and n.name in names]
    places = {node.name: node for node in given}
    order = [places[name] for name in signature.user_inputs if isinstance(name, str)]
    count = len(inputs.tensors)
    left = iter(order[count:])
    weights, values, is_parameter = _weights(program)
    _drop_checks(graph)
    return Trace(
        graph=graph,
        raw=tuple(order[:count]),
        looked=tuple(None if tensor is None else next(left) for tensor in looked),
        ids=tuple(ids),
        logit=logit,
        weights=weights,
        values=values,
        is_parameter=is_parameter,
    )


def _weights(
    program: torch.export.ExportedProgram,
) -> tuple[dict[str, str], dict[str, Tensor], dict[str, bool]]:
    weights, values, is_parameter = {}, {}, {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        name = spec.target.removeprefix(_PREFIX)
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        assert isinstance(value, Tensor), spec
        weights[spec.arg.name] = name
        values[name] = value
        is_parameter[name] = isinstance(value, nn.Parameter) and value.requires_grad
    return weights, values, is_parameter


def _refuse_random(graph: fx.Graph) -> None:
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise ArchitectureError(
                f"the module draws at random in eval mode: {node.target}{line_of(node)}",
                expected="logits that depend on the inputs alone",
                hint="use nn.Dropout instead of F.dropout, which ignores eval()",
            )


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and any(f".{name}" in str(node.target) for name in _CHECKS):
            graph.erase_node(node)


def drop_unused(graph: fx.Graph) -> None:
    """Remove operators whose results nothing reads."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def op_name(node: fx.Node) -> str:
    """Return the name of a node's operator, as graphs call it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return {"aten.sym_size.int": "size", "aten._unsafe_view.default": "aten.view.default"}.get(
            name, name
        )
    if isinstance(target, str):
        return target
    return str(getattr(target, "__name__", target))


def line_of(node: fx.Node) -> str:
    """Return where in the user's code an operator comes from, to be put behind its name."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    found = [line for line in lines if line.startswith("File ") and _is_users(line)]
    if not found:
        return ""
    file, _, rest = found[-1].removeprefix('File "').partition('", line ')
    return f" ({Path(file).name}, line {rest.partition(',')[0]})"


def _is_users(line: str) -> bool:
    return "/torch/" not in line and _PACKAGE not in line


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Report what a module or torch raises, with the line of the user's code.

    Args:
        what: What failed.

    Raises:
        ArchitectureError: Something did.
    """
    try:
        yield
    except ArchitectureError:
        raise
    except Exception as error:  # a user's code may raise anything
        text = " ".join(str(error).split())[:400]
        frames = traceback.extract_tb(error.__traceback__)
        users = [f for f in frames if _is_users(f.filename) and "/dmt_convert/" not in f.filename]
        where = f" ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""
        raise ArchitectureError(
            f"{what}{where}: {type(error).__name__}: {text}",
            expected="a forward() without branches on values, for any number of rows",
            hint="change this line, or describe the model by an ADAPTER (docs/adapters.md)",
        ) from error
