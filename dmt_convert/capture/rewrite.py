"""A traced graph becomes one over features and dense inputs, and then data."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import fx

from dmt_convert.capture.captured import DenseColumn
from dmt_convert.capture.front import Front, column_name
from dmt_convert.capture.graph import DENSE, FEATURE, CapturedGraph, Node, WeightSpec
from dmt_convert.capture.operators import (
    DTYPES,
    ELEMENTWISE,
    LOOKS_UP,
    MAKES,
    MOVES,
    OPERATORS,
    SQUASHES,
)
from dmt_convert.capture.raw_inputs import Inputs
from dmt_convert.capture.sources import ROWS, Origin, Places, runs
from dmt_convert.capture.tracing import Trace, drop_unused, line_of, op_name
from dmt_convert.errors import ArchitectureError

_ATEN: Final = torch.ops.aten
_DROPPED: Final = ("device", "layout", "memory_format", "non_blocking", "pin_memory")
"""Arguments that say where and how a result is stored."""
_FOLLOWED: Final = MOVES - {"aten.cat.default", "aten.expand.default", "aten.index_select.default"}
"""Operators that are followed from an input to the first one that computes."""
_RESHAPES: Final = frozenset(
    {
        "aten.alias.default",
        "aten.clone.default",
        "aten.detach.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.unsqueeze.default",
        "aten.view.default",
    }
)


class Rewriting:
    """Rewrites the graph of a trace in place.

    Args:
        trace: The traced module.
        front: Its features.
        places: Where elements come from.
        inputs: What it is called with.
    """

    def __init__(self, trace: Trace, front: Front, places: Places, inputs: Inputs) -> None:
        self.graph, self.trace, self.front = trace.graph, trace, front
        self._places, self._inputs = places, inputs
        for node in list(self.graph.nodes):
            if node.op == "output":
                self.graph.erase_node(node)
        self._output = self.graph.output(trace.logit)
        drop_unused(self.graph)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            self.dense_node = self.graph.placeholder("dmt_dense")
            self.feature_nodes = [
                self.graph.placeholder(f"dmt_feature_{i}") for i in range(len(front.features))
            ]
        with self.graph.inserting_before(self._first_call()):
            self._rows = self.graph.call_function(_ATEN.sym_size.int, (self.feature_nodes[0], 0))

    def run(self) -> tuple[tuple[DenseColumn, ...], bool]:
        """Rewrite the graph.

        Returns:
            The dense inputs, and whether a sigmoid was at the end.

        Raises:
            ArchitectureError: Ids are used behind the look-ups.
        """
        for call, node in zip(self.front.calls, self.trace.looked, strict=True):
            if node is not None and call is not None and node.users:
                with self.graph.inserting_before(self._first_use(node)):
                    vectors = self._vectors(call.vectors)
                    if call.shape is not None:
                        dim = len(call.vectors[0][1])
                        vectors = self._view(vectors, (*call.shape, dim))
                node.replace_all_uses_with(vectors)
        self._answer_sizes()
        drop_unused(self.graph)
        dense = self._read_dense()
        sigmoid = self._drop_sigmoid()
        drop_unused(self.graph)
        return dense, sigmoid

    def _first_call(self) -> fx.Node:
        found: fx.Node = next(n for n in self.graph.nodes if n.op in ("call_function", "output"))
        return found

    def _first_use(self, node: fx.Node) -> fx.Node:
        found: fx.Node = next(n for n in self.graph.nodes if n in node.users)
        return found

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _view(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return self._call(_ATEN.view.default, node, [self._rows, *shape])

    def _vectors(self, vectors: Sequence[tuple[int, range]]) -> fx.Node:
        """Put columns of features side by side."""
        parts = []
        for feature, columns in vectors:
            node = self.feature_nodes[feature]
            if len(columns) < self.front.features[feature].table.dim:
                node = self._call(_ATEN.slice.Tensor, node, 1, columns.start, columns.stop)
            parts.append(node)
        return parts[0] if len(parts) == 1 else self._call(_ATEN.cat.default, parts, 1)

    def _answer_sizes(self) -> None:
        """Let sizes of inputs be those of a feature."""
        inputs = self._followed()
        for node in [n for n in self.graph.nodes if op_name(n) == "size"]:
            if node.args[0] not in inputs:
                continue
            size = self._places.size(node)
            with self.graph.inserting_after(self._rows):
                jagged = node.args[0] in self.trace.raw and self._is_jagged(node.args[0])
                if node.args[1] not in (0, -node.args[0].meta["val"].ndim):
                    node.replace_all_uses_with(size)
                elif jagged and size != ROWS:
                    count = (self._rows, size // ROWS)
                    node.replace_all_uses_with(self.graph.call_function(operator.mul, count))
                else:
                    node.replace_all_uses_with(self._rows)

    def _is_jagged(self, node: fx.Node) -> bool:
        return self._owner(node)[1]

    def _owner(self, node: fx.Node) -> tuple[int, bool]:
        owners = [(i, entry.is_jagged) for i, entry in enumerate(self._inputs.raw)
                  for _ in entry.tensors]  # fmt: skip
        return owners[self.trace.raw.index(node)]

    def _followed(self) -> dict[fx.Node, None]:
        """Return the inputs, and what operators that only move elements make of them."""
        found = dict.fromkeys(self.trace.raw)
        for node in self.graph.nodes:
            if node.op == "call_function" and op_name(node) in _FOLLOWED:
                source = node.args[0]
                if isinstance(source, fx.Node) and source in found:
                    found[node] = None
        return found

    def _read_dense(self) -> tuple[DenseColumn, ...]:
        """Let dense inputs take the place of what is read of the inputs."""
        followed = self._followed()
        read: dict[fx.Node, Origin] = {}
        for node in followed:
            users = [user for user in node.users if user not in followed]
            if users:
                read[node] = self._origin(node, users[0])
        used = sorted(
            {pair for o in read.values() for pair in zip(o.source, o.column, strict=True)}
        )
        place = {pair: i for i, pair in enumerate(used)}
        for node, origin in read.items():
            users = [user for user in node.users if user not in followed]
            columns = [place[p] for p in zip(origin.source, origin.column, strict=True)]
            with self.graph.inserting_before(self._first_use(node)):
                value = self._dense_value(node, origin, columns, len(used))
            for user in users:
                user.replace_input_with(node, value)
        dense = []
        for source, column in used:
            entry = self._inputs.raw[source]
            width = math.prod(entry.value.shape[1:])
            name = column_name(entry.name, width, column)
            dense.append(DenseColumn(name=name, source=source, column=column))
        return tuple(dense)

    def _origin(self, node: fx.Node, user: fx.Node) -> Origin:
        """Return which columns a node holds.

        Raises:
            ArchitectureError: One is an id.
        """
        how = f"{op_name(user)}{line_of(user)}"
        if node in self.trace.raw and self._is_jagged(node):
            raise _refuse_behind(self._inputs.raw[self._owner(node)[0]].name, how)
        origin = self._places.origin(node, "inputs that are read behind the look-ups")
        for source, column in zip(origin.source, origin.column, strict=True):
            if (source, column) in self.front.columns:
                entry = self._inputs.raw[source]
                width = math.prod(entry.value.shape[1:])
                raise _refuse_behind(column_name(entry.name, width, column), how)
        return origin

    def _dense_value(
        self, node: fx.Node, origin: Origin, columns: Sequence[int], width: int
    ) -> fx.Node:
        parts = [
            self.dense_node
            if (begin, end) == (0, width)
            else self._call(_ATEN.slice.Tensor, self.dense_node, 1, begin, end)
            for begin, end in runs(columns)
        ]
        value = parts[0] if len(parts) == 1 else self._call(_ATEN.cat.default, parts, 1)
        if origin.shape != (len(columns),):
            value = self._view(value, origin.shape)
        dtype = node.meta["val"].dtype
        if dtype != torch.float32:
            value = self._call(_ATEN._to_copy.default, value, dtype=dtype)
        return value

    def _drop_sigmoid(self) -> bool:
        """Leave out a sigmoid at the end, behind which the shape may change."""
        node = self._output.args[0]
        while isinstance(node, fx.Node) and op_name(node) in _RESHAPES and len(node.users) == 1:
            node = node.args[0]
        if not isinstance(node, fx.Node) or op_name(node) != "aten.sigmoid.default":
            return False
        if len(node.users) != 1:
            return False
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node.replace_all_uses_with(before)
        return True

    def may_be_probability(self) -> bool:
        """Tell whether a sigmoid or softmax is so near to the end that no layer follows it."""
        left = [self._output.args[0]]
        seen: set[object] = set()
        while left:
            node = left.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            op = op_name(node)
            if op in SQUASHES:
                return True
            left += node.all_input_nodes if op in MOVES | ELEMENTWISE else []
        return False

    def audit(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ArchitectureError: A table is read behind the look-ups, a look-up is hidden in another
                operator, or an operator is not known.
        """
        weights = {
            n: self.trace.weights[n.name]
            for n in self.graph.nodes
            if n.op == "placeholder" and n.name in self.trace.weights and n.users
        }
        for node, name in weights.items():
            if name in self.front.tables:
                user = next(iter(node.users))
                raise ArchitectureError(
                    f"the table {name} is also read behind the look-ups, by "
                    f"{op_name(user)}{line_of(user)}",
                    expected="tables that only look-ups read",
                    hint="weights that are tied to a table cannot be trained in two places",
                )
        varies: set[fx.Node] = {self.dense_node, *self.feature_nodes}
        unknown: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            given = [arg for arg in node.all_input_nodes if arg in varies]
            if given and op_name(node) != "size":
                varies.add(node)
            first = node.args[0] if node.args else None
            if op_name(node) in LOOKS_UP and given and first not in varies:
                raise ArchitectureError(
                    f"a look-up is hidden in {op_name(node)}{line_of(node)}: it takes rows of a "
                    "parameter or constant by an input",
                    expected="look-ups by nn.Embedding, nn.EmbeddingBag or an "
                    "EmbeddingBagCollection",
                    hint="make the parameter the weight of an nn.Embedding, and call it",
                )
            if op_name(node) not in OPERATORS:
                unknown.setdefault(op_name(node), line_of(node))
        if unknown:
            raise ArchitectureError(
                "the module uses operators that cannot be captured: "
                + ", ".join(f"{op}{line}" for op, line in unknown.items()),
                expected="the operators listed in dmt_convert/capture/operators.py",
                hint="write it with plainer operators, or describe the model by an ADAPTER "
                "(docs/adapters.md)",
            )

    def to_graph(self) -> CapturedGraph:
        """Return the graph as data."""
        names: dict[fx.Node, dict[str, str]] = {self.dense_node: {"node": DENSE}}
        for i, node in enumerate(self.feature_nodes):
            names[node] = {"node": f"{FEATURE}{i}"}
        nodes, weights = [], {}
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.users and node.name in self.trace.weights:
                name = self.trace.weights[node.name]
                names[node] = {"weight": name}
                weights[name] = self._weight(name)
            elif node.op == "call_function":
                op = op_name(node)
                kwargs = {k: v for k, v in node.kwargs.items() if k not in _DROPPED}
                if op in MAKES and "dtype" not in kwargs and "val" in node.meta:
                    kwargs["dtype"] = node.meta["val"].dtype
                nodes.append(
                    Node(
                        name=node.name,
                        op=op,
                        args=[_encode(arg, names) for arg in node.args],
                        kwargs={k: _encode(v, names) for k, v in kwargs.items() if v is not None},
                    )
                )
                names[node] = {"node": node.name}
        output = names[self._output.args[0]]
        return CapturedGraph(nodes=tuple(nodes), weights=weights, output=output.get("node", ""))

    def _weight(self, name: str) -> WeightSpec:
        value = self.trace.values[name]
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ArchitectureError(
                f"the tensor {name} is of type {dtype}",
                expected="a module in float32",
                hint="module.float()",
            )
        return WeightSpec(
            shape=tuple(value.shape), dtype=dtype, trained=self.trace.is_parameter[name]
        )


def _encode(value: Any, names: dict[fx.Node, dict[str, str]]) -> Any:
    """Return an argument as JSON."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return [_encode(entry, names) for entry in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device | torch.memory_format | torch.layout):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _refuse_behind(name: str, how: str) -> ArchitectureError:
    return ArchitectureError(
        f"the ids {name!r} are also used behind the look-ups, by {how}",
        expected="ids that are only looked up: a bundle's dense part gets embeddings, no ids",
        hint="a mask of padding can be an input of its own; give it to the module as floats",
    )
