"""Few bags of any length in a graph: those of all features in one rectangle, read in one go.

A node costs microseconds whatever it does, so that a request of one row is bound by how many there
are; large batches are bound by memory, and read one feature after the other.

Letters: B batch, F features, L ids per bag, N embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_ids import Lookup, stacked_ids
from dmt_convert.serving.onnx_tables import read_rows, weighted_sum

_CACHED_BYTES: Final = 1 << 20
"""Rows that one rectangle may hold: as much as a core's own cache."""


def can_stack(lookups: Sequence[Lookup]) -> bool:
    """Tell whether features lie in one stack of tables and are all weighted, or none is."""
    kinds = {(lookup.stack.tables, lookup.input.weighted) for lookup in lookups}
    return len(lookups) > 1 and len(kinds) == 1


def is_small(
    graph: GraphBuilder, lookups: Sequence[Lookup], lengths_FB: str, longest_F: str
) -> str:
    """Return whether one rectangle has cells and they stay in cache, bool, shape ()."""
    limit = _CACHED_BYTES // (4 * lookups[0].stack.dim)
    most = graph.node("ReduceMax", longest_F, name="longest_of_all", keepdims=0)
    width = graph.node("Max", most, graph.ints("one_scalar", 1), name="width_of_all")
    bags = graph.node("Size", lengths_FB, name="num_bags_of_all")
    cells = graph.node("Mul", width, bags, name="cells_of_all")
    # an empty batch has none, and no shape that could be told from it
    within = graph.node(
        "Clip", cells, graph.ints("one_scalar", 1), graph.ints("cached_rows", limit), name="within"
    )
    return graph.node("Equal", cells, within, name="is_small")


def pool_stacked(
    graph: GraphBuilder, lookups: Sequence[Lookup], lengths_FB: str, longest_F: str
) -> str:
    """Look up and pool all features: (B, F * N).

    Args:
        graph: The graph.
        lookups: The features, which `can_stack`.
        lengths_FB: Lengths of their bags, checked.
        longest_F: The longest of each.
    """
    one, flat = graph.ints("one", [1]), graph.ints("flat", [-1])
    lengths = graph.node("Reshape", lengths_FB, flat, name="lengths_of_all")
    starts = graph.node(
        "CumSum", lengths, graph.ints("zero_scalar", 0), name="starts_of_all", exclusive=1
    )
    most = graph.node("ReduceMax", longest_F, name="most", keepdims=0)
    width = graph.node("Max", most, graph.ints("one_scalar", 1), name="width")
    steps = graph.node(
        "Range", graph.ints("zero_scalar", 0), width, graph.ints("one_scalar", 1), name="steps"
    )
    column = graph.node("Unsqueeze", lengths, one, name="lengths_column")
    filled = graph.node("Less", steps, column, name="filled")
    begin = graph.node("Unsqueeze", starts, one, name="starts_column")
    nth = graph.node("Add", begin, steps, name="positions")
    every = [lookup.input.ids for lookup in lookups]
    ids = graph.node("Concat", *every, graph.ints("zero", [0]), name="ids_and_filler", axis=0)
    end = graph.node(
        "Sub", graph.node("Size", ids, name="num_ids"), graph.ints("one_scalar", 1), name="end"
    )
    positions = graph.node("Where", filled, nth, end, name="positions_or_end")
    rows = read_rows(graph, lookups[0].stack, _rows_of_stack(graph, lookups, ids, positions))
    if lookups[0].input.weighted:
        given = [str(lookup.input.weights) for lookup in lookups]
        weights = graph.node(
            "Concat", *given, graph.floats("zero", [0]), name="weights_and_filler", axis=0
        )
        each = graph.node("Gather", weights, positions, name="weights")
    else:
        each = graph.cast(filled, "fp32", name="filled_as_fp32")
    means = [lookup.feature.pooling == "mean" for lookup in lookups]
    if any(means):
        each = graph.node("Div", each, _counts(graph, means, lengths_FB), name="shares")
    pooled = weighted_sum(graph, rows, each)
    features, dim = len(lookups), lookups[0].stack.dim
    by_feature = graph.node(
        "Reshape", pooled, graph.ints("FBN", [features, -1, dim]), name="by_feature"
    )
    by_row = graph.node("Transpose", by_feature, name="by_row", perm=[1, 0, 2])
    return graph.node("Reshape", by_row, graph.ints("BM", [-1, features * dim]), name="pooled")


def _rows_of_stack(graph: GraphBuilder, lookups: Sequence[Lookup], ids: str, positions: str) -> str:
    """Return rows in the stack, shape (F * B, L)."""
    picked = graph.node("Gather", ids, positions, name="ids_of_bags")
    apart = graph.node(
        "Reshape", picked, graph.ints("by_feature", [len(lookups), -1]), name="ids_by_feature"
    )
    rows = stacked_ids(graph, lookups, apart, axis=0)
    return graph.node(
        "Reshape", rows, graph.node("Shape", positions, name="shape"), name="rows_of_bags"
    )


def _counts(graph: GraphBuilder, means: Sequence[bool], lengths_FB: str) -> str:
    """Return by what every bag is divided, float32, shape (F * B, 1)."""
    one = graph.ints("one", [1])
    some = graph.node("Max", lengths_FB, one, name="lengths_or_one")
    if not all(means):
        is_sum = graph.ints("is_sum", [[int(not mean)] for mean in means])
        is_sum = graph.cast(is_sum, "bool", name="is_sum_as_bool")
        some = graph.node("Where", is_sum, one, some, name="divisors")
    column = graph.node("Reshape", some, graph.ints("column", [-1, 1]), name="divisors_column")
    return graph.cast(column, "fp32", name="counts")
