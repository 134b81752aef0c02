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


def is_small(b: GraphBuilder, lookups: Sequence[Lookup], lengths_FB: str, longest_F: str) -> str:
    """Return whether one rectangle has cells and they stay in cache, bool, shape ()."""
    limit = _CACHED_BYTES // (4 * lookups[0].stack.dim)
    most = b.node("ReduceMax", longest_F, name="longest_of_all", keepdims=0)
    width = b.node("Max", most, b.ints("one_", 1), name="width_of_all")
    bags = b.node("Size", lengths_FB, name="num_bags_of_all")
    cells = b.node("Mul", width, bags, name="cells_of_all")
    # an empty batch has none, and no shape that could be told from it
    within = b.node("Clip", cells, b.ints("one_", 1), b.ints("cached_rows", limit), name="within")
    return b.node("Equal", cells, within, name="is_small")


def pool_stacked(
    b: GraphBuilder, lookups: Sequence[Lookup], lengths_FB: str, longest_F: str
) -> str:
    """Look up and pool all features: (B, F * N).

    Args:
        b: The graph.
        lookups: The features, which `can_stack`.
        lengths_FB: Lengths of their bags, checked.
        longest_F: The longest of each.
    """
    one, flat = b.ints("one", [1]), b.ints("flat", [-1])
    lengths = b.node("Reshape", lengths_FB, flat, name="lengths_of_all")
    starts = b.node("CumSum", lengths, b.ints("zero_", 0), name="starts_of_all", exclusive=1)
    most = b.node("ReduceMax", longest_F, name="most", keepdims=0)
    width = b.node("Max", most, b.ints("one_", 1), name="width")
    steps = b.node("Range", b.ints("zero_", 0), width, b.ints("one_", 1), name="steps")
    column = b.node("Unsqueeze", lengths, one, name="lengths_column")
    filled = b.node("Less", steps, column, name="filled")
    begin = b.node("Unsqueeze", starts, one, name="starts_column")
    nth = b.node("Add", begin, steps, name="positions")
    every = [lookup.input.ids for lookup in lookups]
    ids = b.node("Concat", *every, b.ints("zero", [0]), name="ids_and_filler", axis=0)
    end = b.node("Sub", b.node("Size", ids, name="num_ids"), b.ints("one_", 1), name="end")
    positions = b.node("Where", filled, nth, end, name="positions_or_end")
    rows = read_rows(b, lookups[0].stack, _rows_of_stack(b, lookups, ids, positions))
    if lookups[0].input.weighted:
        given = [str(lookup.input.weights) for lookup in lookups]
        weights = b.node("Concat", *given, b.floats("zero", [0]), name="weights_and_filler", axis=0)
        each = b.node("Gather", weights, positions, name="weights")
    else:
        each = b.node("Cast", filled, name="filled_as_fp32", to=1)
    means = [lookup.feature.pooling == "mean" for lookup in lookups]
    if any(means):
        each = b.node("Div", each, _counts(b, means, lengths_FB), name="shares")
    pooled = weighted_sum(b, rows, each)
    features, dim = len(lookups), lookups[0].stack.dim
    by_feature = b.node("Reshape", pooled, b.ints("FBN", [features, -1, dim]), name="by_feature")
    by_row = b.node("Transpose", by_feature, name="by_row", perm=[1, 0, 2])
    return b.node("Reshape", by_row, b.ints("BM", [-1, features * dim]), name="pooled")


def _rows_of_stack(b: GraphBuilder, lookups: Sequence[Lookup], ids: str, positions: str) -> str:
    """Return rows in the stack, shape (F * B, L)."""
    picked = b.node("Gather", ids, positions, name="ids_of_bags")
    apart = b.node(
        "Reshape", picked, b.ints("by_feature", [len(lookups), -1]), name="ids_by_feature"
    )
    rows = stacked_ids(b, lookups, apart, axis=0)
    return b.node("Reshape", rows, b.node("Shape", positions, name="shape"), name="rows_of_bags")


def _counts(b: GraphBuilder, means: Sequence[bool], lengths_FB: str) -> str:
    """Return by what every bag is divided, float32, shape (F * B, 1)."""
    one = b.ints("one", [1])
    some = b.node("Max", lengths_FB, one, name="lengths_or_one")
    if not all(means):
        is_sum = b.ints("is_sum", [[int(not mean)] for mean in means])
        is_sum = b.node("Cast", is_sum, name="is_sum_as_bool", to=9)
        some = b.node("Where", is_sum, one, some, name="divisors")
    column = b.node("Reshape", some, b.ints("column", [-1, 1]), name="divisors_column")
    return b.node("Cast", column, name="counts", to=1)
