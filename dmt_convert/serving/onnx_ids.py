"""Ids in a graph, kept inside their tables.

Letters: B batch, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmt_convert.serving.graph_inputs import FeatureInput
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_tables import TableStack
from dmt_convert.spec import FeatureSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """One feature, and where it is looked up."""

    feature: FeatureSpec
    """The feature."""
    input: FeatureInput
    """How its bags come."""
    stack: TableStack
    """The tables among which its own is."""
    rows: int
    """Rows of its table."""
    clip: bool
    """Whether an id outside it takes the nearest row; else the graph fails."""


def checked_ids(graph: GraphBuilder, lookup: Lookup, ids: str) -> str:
    """Return ids of any shape such that reading their rows fails where one is outside the table.

    Runtimes refuse ids behind a table's end, but take negative ones from there backwards: these are
    moved to just behind the end.
    """
    if lookup.clip:
        low, high = graph.ints("id_low", 0), graph.ints("id_high", lookup.rows - 1)
        return graph.node("Clip", ids, low, high, name="ids_clipped")
    negative = graph.node("Less", ids, graph.ints("zero", [0]), name="ids_below_zero")
    behind = graph.ints("behind_the_end", [lookup.rows])
    return graph.node("Where", negative, behind, ids, name="ids_or_behind_the_end")


def stacked_ids(graph: GraphBuilder, group: Sequence[Lookup], ids: str, *, axis: int) -> str:
    """Turn ids into rows of the stack; those outside their table go behind its end.

    So the lookup itself fails, and the number that it complains about, less the stack's rows,
    says which of the features it was.

    Args:
        graph: The graph.
        group: Features of one stack.
        ids: Their ids: shape (B, F), or (F, any).
        axis: Where the features stand, 1 or 0.
    """
    stack = group[0].stack
    shape = (1, -1) if axis else (-1, 1)

    def each(name: str, values: Sequence[int]) -> str:
        return graph.ints(name, np.reshape(np.asarray(values, dtype=np.int64), shape))

    last = each("last_rows", [lookup.rows - 1 for lookup in group])
    first = each("first_rows", [stack.first_row(lookup.feature.table) for lookup in group])
    if group[0].clip:
        low = graph.node("Max", ids, graph.ints("zero", [0]), name="ids_from_zero")
        return graph.node(
            "Add", graph.node("Min", low, last, name="ids_clipped"), first, name="rows_of_stack"
        )
    below = graph.node("Less", ids, graph.ints("zero", [0]), name="ids_below_zero")
    above = graph.node("Greater", ids, last, name="ids_above_last_row")
    outside = graph.node("Or", below, above, name="ids_outside_their_table")
    behind = each("behind_the_end", [sum(stack.rows) + i for i in range(len(group))])
    moved = graph.node("Add", ids, first, name="ids_in_the_stack")
    return graph.node("Where", outside, behind, moved, name="ids_or_behind_the_end")
