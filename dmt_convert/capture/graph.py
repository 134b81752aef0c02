"""A captured graph as data: what `network.config` of a bundle holds, and whether it may be run.

A graph is a list of nodes. Each has a name, an operator of `OPERATORS`, and arguments, which are
JSON values or one of these objects:

- `{"node": name}`: what an earlier node gives, or an input: `dense`, or `feature.3`
- `{"weight": name}`: a weight
- `{"dtype": "float32"}`, `{"float": "-inf"}`

Nothing here imports torch, and nothing is run. `CapturedNetwork` runs a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.capture.operators import DTYPES, OPERATORS
from dmt_convert.errors import ArchitectureError

CAPTURED: Final = "captured"
"""Name of the networks that were captured from a live module."""
DENSE: Final = "dense"
FEATURE: Final = "feature."
MAX_NODES: Final = 50_000
MAX_ELEMENTS: Final = 1 << 31
"""Elements of a weight, or largest number in an argument."""
MAX_CONSTANT: Final = 1 << 20
"""Elements of a list of arguments."""
_MAX_DEPTH: Final = 4
_MAX_SHOWN: Final = 20
_HINT: Final = "use the version of dmt-convert that wrote the bundle, or convert the model again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One step of a graph."""

    name: str
    """What later nodes call its result."""
    op: str
    """The operator."""
    args: Sequence[Any]
    """Positional arguments, as JSON."""
    kwargs: Mapping[str, Any]
    """Arguments by name, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A tensor that a graph reads."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """A name of `DTYPES`."""
    trained: bool
    """Whether it is a parameter; buffers stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedGraph:
    """A graph that has been checked."""

    nodes: tuple[Node, ...]
    """Its nodes; each reads only what stands before it."""
    weights: Mapping[str, WeightSpec]
    """Its weights by their names in the module that it was captured from."""
    output: str
    """Name of the node that gives the logits, shape (B,) or (B, 1)."""

    def to_config(self) -> dict[str, Any]:
        """Return what `read_graph` reads."""
        return {
            "nodes": [[n.name, n.op, list(n.args), dict(n.kwargs)] for n in self.nodes],
            "weights": {
                name: {"shape": list(w.shape), "dtype": w.dtype, "trained": w.trained}
                for name, w in self.weights.items()
            },
            "output": self.output,
        }


def read_graph(
    config: Mapping[str, Any],
    num_features: int,
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> CapturedGraph:
    """Read a captured graph, and refuse one that may not be run.

    Args:
        config: What a bundle says.
        num_features: Features of the model.
        stored: Weight -> shape of the tensor that is stored; None: not known.

    Raises:
        ArchitectureError: An operator is unknown, a node reads what has not been computed, or a
            weight or a constant is not what it should be. All faults are listed.
    """
    faults: list[str] = []
    nodes = tuple(_read_nodes(config.get("nodes"), faults))
    weights = dict(_read_weights(config.get("weights"), faults))
    known = {DENSE, *(f"{FEATURE}{i}" for i in range(num_features))}
    for node in nodes:
        if node.op not in OPERATORS:
            faults.append(f"node {node.name!r}: unknown operator {node.op!r}")
        read = [*_references([node.args, node.kwargs], f"node {node.name!r}", faults)]
        faults += [
            f"node {node.name!r} reads {name!r}, which has not been computed (a cycle, or missing)"
            for kind, name in read
            if kind == "node" and name not in known
        ]
        faults += [
            f"node {node.name!r} reads the weight {name!r}, which is not listed"
            for kind, name in read
            if kind == "weight" and name not in weights
        ]
        if node.name in known:
            faults.append(f"two nodes are called {node.name!r}")
        known.add(node.name)
    output = config.get("output")
    if not isinstance(output, str) or output not in known:
        faults.append(f"the output {output!r} is not a node")
    if stored is not None:
        faults += _compare(weights, stored)
    if faults:
        more = len(faults) - _MAX_SHOWN
        raise ArchitectureError(
            f"the model's captured dense part may not be run: {len(faults)} faults",
            expected="a graph as dmt-convert writes it, and its weights",
            hint=_HINT,
            details=faults[:_MAX_SHOWN] + ([f"... and {more} more"] if more > 0 else []),
        )
    return CapturedGraph(nodes=nodes, weights=weights, output=str(output))


def list_references(node: Node) -> list[tuple[str, str]]:
    """Return what a node reads: `node` or `weight`, and its name."""
    return [*_references([node.args, node.kwargs], node.name, [])]


def _read_nodes(value: object, faults: list[str]) -> Iterator[Node]:
    if not isinstance(value, list | tuple) or len(value) > MAX_NODES:
        faults.append(f"nodes is not a list of up to {MAX_NODES} nodes")
        return
    for i, entry in enumerate(value):
        match entry:
            case [str(name), str(op), list() | tuple() as args, Mapping() as kwargs]:
                yield Node(name=name, op=op, args=args, kwargs=kwargs)
            case _:
                faults.append(f"node {i} is not [name, operator, arguments, arguments by name]")


def _read_weights(value: object, faults: list[str]) -> Iterator[tuple[str, WeightSpec]]:
    if not isinstance(value, Mapping):
        faults.append("weights is not a map")
        return
    for name, entry in value.items():
        match entry:
            case {
                "shape": list() | tuple() as shape,
                "dtype": str(dtype),
                "trained": bool(trained),
            } if dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape):
                spec = WeightSpec(shape=tuple(shape), dtype=dtype, trained=trained)
            case _:
                faults.append(f"weight {name!r} has no shape, known dtype and `trained`")
                continue
        if math.prod(spec.shape) > MAX_ELEMENTS:
            faults.append(f"weight {name!r} has shape {list(spec.shape)}")
        elif not all(str(name).split(".")):
            faults.append(f"weight {name!r} has no name of a module's tensor")
        elif trained and dtype != "float32":
            faults.append(f"weight {name!r} is trained and {dtype}, not float32")
        else:
            yield str(name), spec


def _references(
    value: object, where: str, faults: list[str], depth: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield the nodes and weights that arguments name; note what may not stand there."""
    match value:
        case None | bool() | str():
            if isinstance(value, str) and len(value) > 32:
                faults.append(f"{where} has a text of {len(value)} characters")
        case int() | float():
            if not math.isfinite(value) or (isinstance(value, int) and abs(value) > 1 << 63):
                faults.append(f"{where} has a number {value}")
        case {"node": str(name), **rest} if not rest:
            yield "node", name
        case {"weight": str(name), **rest} if not rest:
            yield "weight", name
        case {"dtype": str(name), **rest} if not rest and name in DTYPES:
            pass
        case {"float": "inf" | "-inf" | "nan", **rest} if not rest:
            pass
        case list() | tuple() if depth < _MAX_DEPTH:
            if len(value) > MAX_CONSTANT:
                faults.append(f"{where} has a list of {len(value)} values")
                return
            for entry in value:
                yield from _references(entry, where, faults, depth + 1)
        case Mapping() if depth == 1:  # arguments by name
            for entry in value.values():
                yield from _references(entry, where, faults, depth + 1)
        case _:
            faults.append(f"{where} has an argument {str(value)[:60]!r}")


def _compare(
    weights: Mapping[str, WeightSpec], stored: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    for name, spec in weights.items():
        if name not in stored:
            yield f"weight {name!r} is not stored"
        elif stored[name] != spec.shape:
            yield f"weight {name!r} has shape {list(spec.shape)}, stored is {list(stored[name])}"
    for name in stored:
        if name not in weights:
            yield f"weight {name!r} is stored, and not listed"
