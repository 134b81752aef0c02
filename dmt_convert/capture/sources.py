"""Where elements of a traced graph come from: which column of which input each one is.

The operators between an input and an id, or a dense value, may only move elements, cast them, or
add a constant. Instead of following every operator by rules of its own, the graph is run on
numbers that tell their place, and the result is read back.

Letters: B rows of a batch, W columns of an input, P positions per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from dmt_convert.capture.operators import MOVES, NUMBERS
from dmt_convert.capture.raw_inputs import Inputs
from dmt_convert.capture.tracing import Trace, line_of, op_name
from dmt_convert.errors import ArchitectureError

ROWS: Final = 3
"""Rows of the batch of places."""
_SHIFTS: Final = frozenset({"aten.add.Tensor", "aten.sub.Tensor", "aten.arange.start_step"})
_CAST: Final = "aten._to_copy.default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the elements of a tensor come from, row by row."""

    shape: tuple[int, ...]
    """Shape of a row, without the batch."""
    source: tuple[int, ...]
    """Index of the input, for each of P positions."""
    column: tuple[int, ...]
    """Column of the input, flattened per row."""
    added: tuple[int, ...]
    """What is added to it."""


class Places:
    """A traced graph, run on numbers that tell their place.

    Args:
        trace: The graph.
        inputs: What the module is called with.
    """

    def __init__(self, trace: Trace, inputs: Inputs) -> None:
        self._trace = trace
        self._owner = [i for i, entry in enumerate(inputs.raw) for _ in entry.tensors]
        self._jagged = {i for i, entry in enumerate(inputs.raw) if entry.is_jagged}
        self._keys = {i: len(inputs.raw[i].value.keys()) for i in self._jagged}
        shapes = [tuple(tensor.shape) for tensor in inputs.tensors]
        self._codes: dict[int, tuple[int, int]] = {}
        """First code of an input -> the input and W."""
        self._feeds: list[dict[fx.Node, Tensor]] = [{}, {}]
        first = 1
        for i, (node, shape) in enumerate(zip(trace.raw, shapes, strict=True)):
            source, count = self._owner[i], 0
            if source in self._jagged:
                length = self._keys[source] * ROWS if i and self._owner[i - 1] == source else ROWS
                codes = torch.zeros(length, dtype=torch.int64)
            else:
                width = int(torch.Size(shape[1:]).numel())
                count = ROWS * width
                codes = torch.arange(first, first + count).reshape(ROWS, *shape[1:])
                self._codes[first] = (source, width)
            first += count
            if inputs.tensors[i].is_floating_point():
                codes = codes.to(torch.float64)
            self._feeds[0][node], self._feeds[1][node] = codes, torch.zeros_like(codes)
        for feeds in self._feeds:
            feeds |= {
                node: torch.zeros(ROWS, *node.meta["val"].shape[1:])
                for node in trace.looked
                if node is not None
            }
            feeds |= {
                node: trace.values[trace.weights[node.name]].detach().cpu()
                for node in trace.graph.nodes
                if node.op == "placeholder" and node.name in trace.weights
            }

    def ids(self, node: fx.Node, what: str) -> Origin:
        """Return where the ids of a look-up come from.

        Args:
            node: The ids.
            what: What to call the look-up.

        Raises:
            ArchitectureError: They are not plain columns of the inputs.
        """
        steps = _steps_before(node)
        if any(step in self._trace.looked for step in steps):
            raise _refuse_ids(what, "are computed from what another look-up gives")
        for step in steps:
            self._check_step(step, what)
        return self.origin(node, f"the ids of {what}")

    def _check_step(self, node: fx.Node, what: str) -> None:
        op = op_name(node)
        if node.op == "placeholder" or op in MOVES | NUMBERS | _SHIFTS:
            return
        if op == _CAST and not node.meta["val"].is_floating_point():
            return
        raise _refuse_ids(what, f"are computed by {op}{line_of(node)}")

    def origin(self, node: fx.Node, what: str) -> Origin:
        """Return where the elements of a tensor come from.

        Args:
            node: The tensor.
            what: What to call it in errors.

        Raises:
            ArchitectureError: They are not elements of the inputs, each of its own row.
        """
        try:
            told, zero = (_evaluate(node, feeds) for feeds in self._feeds)
        except Exception as error:  # an operator that cannot run on places
            raise _unfollowed(what, node) from error
        if not isinstance(told, Tensor) or not told.ndim or len(told) != ROWS:
            raise _unfollowed(what, node)
        shift = zero.reshape(ROWS, -1).to(torch.int64)
        codes = told.reshape(ROWS, -1).to(torch.int64) - shift
        places = [[self._find(int(code)) for code in row] for row in codes]
        first = [place and (place[0], place[2]) for place in places[0]]
        for row, found in enumerate(places):
            here = [place and (place[0], place[2]) for place in found]
            if here != first or any(place is None or place[1] != row for place in found):
                raise _unfollowed(what, node)
        if not torch.equal(shift, shift[:1].expand_as(shift)):
            raise _unfollowed(what, node)
        columns = [place for place in places[0] if place is not None]
        return Origin(
            shape=tuple(told.shape[1:]),
            source=tuple(place[0] for place in columns),
            column=tuple(place[2] for place in columns),
            added=tuple(int(n) for n in shift[0]),
        )

    def _find(self, code: int) -> tuple[int, int, int] | None:
        """Return the input, the row and the column of a code."""
        begins = [first for first in self._codes if first <= code]
        if not begins:
            return None
        first = max(begins)
        source, width = self._codes[first]
        row, column = divmod(code - first, width)
        return (source, row, column) if row < ROWS else None

    def size(self, node: fx.Node) -> int:
        """Return a size that inputs have at `ROWS` rows."""
        return int(_evaluate(node, self._feeds[1]))


def _steps_before(node: fx.Node) -> list[fx.Node]:
    """Return a node and all that its elements are made of; sizes are not elements."""
    found: dict[fx.Node, None] = {}
    left = [node]
    while left:
        step = left.pop()
        if step not in found:
            found[step] = None
            left += [] if op_name(step) == "size" else step.all_input_nodes
    return list(found)


def _evaluate(node: fx.Node, feeds: Mapping[fx.Node, Tensor]) -> Any:
    """Run what a node needs."""
    values: dict[fx.Node, Any] = dict(feeds)
    needed: set[fx.Node] = set()
    left: list[fx.Node] = [node]
    while left:
        step = left.pop()
        if step not in needed and step not in feeds:
            needed.add(step)
            left += step.all_input_nodes
    for step in (n for n in node.graph.nodes if n in needed):
        args = fx.map_arg(step.args, values.__getitem__)
        kwargs = fx.map_arg(step.kwargs, values.__getitem__)
        if op_name(step) == "aten.view.default":
            values[step] = torch.reshape(*args)
        else:
            values[step] = step.target(*args, **kwargs)
    return values[node]


def runs(columns: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield the begin and end of every run of neighbouring columns."""
    begin = 0
    for i in range(1, len(columns) + 1):
        if i == len(columns) or columns[i] != columns[i - 1] + 1:
            yield columns[begin], columns[i - 1] + 1
            begin = i


def _refuse_ids(what: str, how: str) -> ArchitectureError:
    return ArchitectureError(
        f"the ids of {what} {how}",
        expected="ids that are columns of the inputs, cast or plus a constant at most",
        hint="compute the ids in the data, and give them to the module",
    )


def _unfollowed(what: str, node: fx.Node) -> ArchitectureError:
    return ArchitectureError(
        f"{what} are not plain columns of the inputs: {op_name(node)}{line_of(node)}",
        expected="columns of the inputs, each of its own row",
        hint="compute them in the data, and give them to the module",
    )
