"""Bags of any length in a graph.

A rectangle as wide as the longest bag is quick, and is taken if bags are about equally long. One
long bag among many would make it take all memory: otherwise bags are cut into chunks that fill
rectangles, pooled, and joined. Few bags of all features are read in one go: a node costs
microseconds whatever it does, so that a request of one row is bound by the number of nodes; large
batches are bound by memory, and read one feature after the other.

Letters: B batch, F features, L ids per bag, C ids per chunk, T chunks, N embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_tables import (
    Lookup,
    Rows,
    checked_ids,
    read_rows,
    stacked_ids,
    weighted_sum,
)

_CACHED_BYTES: Final = 1 << 20
"""Rows that one rectangle may hold: as much as a core's own cache."""
CHUNK: Final = 8
"""C, where bags differ much in length."""
WASTE: Final = (3, 8)
"""A rectangle as wide as the longest bag is used if it has at most 3 cells per id plus 8
per bag."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _AllBags:
    """Bags of all features."""

    lengths: str
    """Lengths, shape (F, B), checked."""
    counts: str
    """Number of ids of each feature, shape (F,)."""
    longest: str
    """The longest bag of each, shape (F,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bags:
    """Bags of one feature."""

    lengths: str
    """Shape (B,), checked."""
    starts: str
    """Where each begins, shape (B,)."""
    count: str
    """Number of ids, shape ()."""
    longest: str
    """Shape ()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunks:
    """Bags cut into chunks."""

    bag: str | None
    """Which bag each belongs to, shape (T,); None where every bag is one chunk."""
    positions: str
    """Positions of the ids, shape (T, C)."""
    filled: str
    """Whether there is one, bool, shape (T, C)."""


def pool_jagged(graph: GraphBuilder, lookups: Sequence[Lookup]) -> list[str]:
    """Look up and pool jagged features, each to (B, N).

    The graph fails where lengths are negative, or do not add up to the number of ids.
    """
    with graph.scope("jagged"):
        return _pool_each(graph, lookups, _all_bags(graph, lookups))


def pool_jagged_stack(graph: GraphBuilder, lookups: Sequence[Lookup]) -> str:
    """Look up and pool jagged features that `can_stack`, side by side: (B, F * N)."""
    with graph.scope("jagged"):
        bags = _all_bags(graph, lookups)
        small = is_small(graph, lookups, bags.lengths, bags.longest)
        with graph.branch("few_bags") as inner:
            pooled = pool_stacked(inner, lookups, bags.lengths, bags.longest)
            inner.output(pooled, "fp32", None)
            few = inner.to_proto()
        with graph.branch("many_bags") as inner:
            each = _pool_each(inner, lookups, bags)
            inner.output(inner.node("Concat", *each, name="joined", axis=1), "fp32", None)
            many = inner.to_proto()
        return graph.node("If", small, name="pooled", then_branch=few, else_branch=many)


def _pool_each(graph: GraphBuilder, lookups: Sequence[Lookup], bags: _AllBags) -> list[str]:
    """Look up and pool one feature after the other, each to (B, N)."""
    ids, weights, own = [], [], []
    for i, lookup in enumerate(lookups):
        with graph.scope(lookup.feature.name):
            checked = checked_ids(graph, lookup, lookup.input.ids)
            ids.append(_one_more(graph, checked, graph.ints("zero", [0]), "ids"))
            weight = lookup.input.weights
            if weight is not None:
                weight = _one_more(graph, weight, graph.floats("zero", [0]), "weights")
            weights.append(weight)
            own.append(_bags_of(graph, bags, i))
    branches = []
    for name in ("rectangles", "chunks"):
        with graph.branch(name) as inner:
            for lookup, of_one, values, weight in zip(lookups, own, ids, weights, strict=True):
                with inner.scope(lookup.feature.name):
                    pool = _pool_even if name == "rectangles" else _pool_chunks
                    pooled = pool(inner, lookup, of_one, values, weight)
                inner.output(pooled, "fp32", None)
            branches.append(inner.to_proto())
    return list(
        graph.nodes(
            "If",
            _is_even(graph, bags),
            name="pooled_each",
            outputs=[f"{graph.prefix}{lookup.feature.name}/pooled" for lookup in lookups],
            then_branch=branches[0],
            else_branch=branches[1],
        )
    )


def _one_more(graph: GraphBuilder, values: str, filler: str, name: str) -> str:
    """Append what padding stands for."""
    return graph.node("Concat", values, filler, name=f"{name}_and_filler", axis=0)


def _all_bags(graph: GraphBuilder, lookups: Sequence[Lookup]) -> _AllBags:
    """Check the lengths of all features."""
    zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
    rows, shapes = [], []
    for lookup in lookups:
        with graph.scope(lookup.feature.name):
            rows.append(
                graph.node("Unsqueeze", str(lookup.input.lengths), zero, name="lengths_row")
            )
            shapes.append(graph.node("Shape", lookup.input.ids, name="num_ids"))
    lengths_FB = graph.node("Concat", *rows, name="lengths", axis=0)
    counts_F = graph.node("Concat", *shapes, name="nums_ids", axis=0)
    longest_F = graph.node("ReduceMax", lengths_FB, one, name="longest", keepdims=0)
    shortest_F = graph.node("ReduceMin", lengths_FB, one, name="shortest", keepdims=0)
    total_F = graph.node("ReduceSum", lengths_FB, one, name="totals", keepdims=0)
    negative = graph.node("Less", shortest_F, zero, name="is_negative")
    beyond = graph.node("Greater", longest_F, counts_F, name="is_beyond")
    wrong = graph.node("Or", negative, beyond, name="is_outside")
    for name, amounts in (
        ("ids", total_F),
        ("weights", _amounts_of_weights(graph, lookups, shapes)),
    ):
        if amounts:
            same = graph.node("Equal", amounts, counts_F, name=f"{name}_add_up")
            wrong = graph.node(
                "Or", wrong, graph.node("Not", same, name=f"{name}_differ"), name="is_wrong"
            )
    index = graph.cast(wrong, "int64", name="wrong")
    number = graph.node(
        "Mul", index, graph.ints("numbers", range(1, len(rows) + 1)), name="wrong_features"
    )
    last = graph.node("ReduceMax", number, name="wrong_feature", keepdims=1)
    # one number fits no other shape than (1): runtimes check this on GPUs too, unlike indices
    shape = graph.node("Add", last, one, name="one_if_lengths_fit_their_ids")
    nothing = graph.node("Reshape", zero, shape, name="lengths_that_do_not_fit_their_ids")
    longest_F = graph.node("Add", longest_F, nothing, name="longest_checked")
    return _AllBags(lengths=lengths_FB, counts=counts_F, longest=longest_F)


def _bags_of(graph: GraphBuilder, bags: _AllBags, feature: int) -> _Bags:
    which = graph.ints("feature", feature)
    lengths = graph.node("Gather", bags.lengths, which, name="lengths")
    return _Bags(
        lengths=lengths,
        starts=graph.node(
            "CumSum", lengths, graph.ints("zero_scalar", 0), name="starts", exclusive=1
        ),
        count=graph.node("Gather", bags.counts, which, name="count"),
        longest=graph.node("Gather", bags.longest, which, name="longest"),
    )


def _amounts_of_weights(
    graph: GraphBuilder, lookups: Sequence[Lookup], amounts: Sequence[str]
) -> str | None:
    """Return how many weights every feature has, (F,); an unweighted one as many as ids."""
    if not any(lookup.input.weighted for lookup in lookups):
        return None
    shapes = [
        amount
        if lookup.input.weights is None
        else graph.node("Shape", lookup.input.weights, name="num_weights")
        for lookup, amount in zip(lookups, amounts, strict=True)
    ]
    return graph.node("Concat", *shapes, name="nums_weights", axis=0)


def _is_even(graph: GraphBuilder, bags: _AllBags) -> str:
    """Tell whether bags are about equally long, bool, shape ()."""
    per_id, per_bag = WASTE
    num_bags = graph.node("Shape", bags.lengths, name="num_bags", start=1)
    cells = graph.node("Mul", bags.longest, num_bags, name="cells")
    spared = graph.node(
        "Mul", num_bags, graph.ints("waste_per_bag", [per_bag]), name="cells_per_bag"
    )
    used = graph.node("Mul", bags.counts, graph.ints("waste_per_id", [per_id]), name="cells_per_id")
    allowed = graph.node("Add", spared, used, name="allowed_cells")
    over = graph.node("Sub", cells, allowed, name="cells_too_many")
    most = graph.node("ReduceMax", over, name="most_cells_too_many", keepdims=0)
    return graph.node("LessOrEqual", most, graph.ints("nothing", 0), name="is_even")


def _pool_even(
    graph: GraphBuilder, lookup: Lookup, bags: _Bags, ids: str, weights: str | None
) -> str:
    """Pool by a rectangle as wide as the longest bag."""
    width = graph.node("Max", bags.longest, graph.ints("one_scalar", 1), name="width")
    positions, filled = _rectangle(graph, bags.starts, bags.lengths, width)
    chunks = _Chunks(bag=None, positions=positions, filled=filled)
    return _pool_first(graph, lookup, bags, chunks, ids, weights)


def _pool_chunks(
    graph: GraphBuilder, lookup: Lookup, bags: _Bags, ids: str, weights: str | None
) -> str:
    """Pool chunk by chunk, then add up the chunks of those bags that have several."""
    zero = graph.ints("zero", [0])
    chunks, counts_B = _cut(graph, bags.lengths, bags.starts)
    sums_TN = _pool_first(graph, lookup, bags, chunks, ids, weights)
    starts_B = graph.node(
        "CumSum", counts_B, graph.ints("zero_scalar", 0), name="chunk_starts", exclusive=1
    )
    several = graph.node("Greater", counts_B, graph.ints("one", [1]), name="is_long")
    long_bags = graph.node(
        "Squeeze", graph.node("NonZero", several, name="long"), zero, name="long_bags"
    )
    joined_KN = _join_chunks(
        graph,
        _has_several(graph, counts_B),
        graph.node("Gather", counts_B, long_bags, name="long_counts"),
        graph.node("Gather", starts_B, long_bags, name="long_starts"),
        sums_TN,
    )
    # short bags are their only chunk; the joined ones lie behind all chunks
    as_int = graph.cast(several, "int64", name="is_long_as_int")
    rank = graph.node("CumSum", as_int, graph.ints("zero_scalar", 0), name="rank", exclusive=1)
    num_chunks = graph.node("Shape", sums_TN, name="all_chunks", start=0, end=1)
    behind = graph.node("Add", rank, num_chunks, name="behind_chunks")
    place = graph.node("Where", several, behind, starts_B, name="places")
    everything = graph.node("Concat", sums_TN, joined_KN, name="chunks_and_joined", axis=0)
    return graph.node("Gather", everything, place, name="pooled_bags")


def _join_chunks(graph: GraphBuilder, several: str, counts: str, starts: str, sums: str) -> str:
    """Add up runs of rows, (T, N), in chunks of chunks until each run is one row: (K, N).

    If no run has several rows, the rows come back unchanged.
    """
    with graph.branch("chunks_of_chunks") as inner:
        inner.input(f"{inner.prefix}turn", "int64", [])
        inner.input(f"{inner.prefix}again", "bool", [])
        before = inner.input(f"{inner.prefix}counts_before", "int64", None)
        begin = inner.input(f"{inner.prefix}starts_before", "int64", None)
        values = inner.input(f"{inner.prefix}sums_before", "fp32", None)
        chunks, after = _cut(inner, before, begin)
        zero = inner.ints("zero", [0])
        positions = inner.node("Where", chunks.filled, chunks.positions, zero, name="at")
        rows = Rows(values=inner.node("Gather", values, positions, name="sums"))
        each = inner.cast(chunks.filled, "fp32", name="filled_as_fp32")
        added = weighted_sum(inner, rows, each)
        first = inner.node(
            "CumSum", after, inner.ints("zero_scalar", 0), name="starts", exclusive=1
        )
        inner.output(_has_several(inner, after), "bool", [])
        inner.output(after, "int64", None)
        inner.output(first, "int64", None)
        inner.output(added, "fp32", None)
        body = inner.to_proto()
    state = (counts, starts, sums)
    return graph.nodes(
        "Loop", "", several, *state, name="joined_chunks", outputs=(None,) * 3, body=body
    )[2]


def _has_several(graph: GraphBuilder, counts: str) -> str:
    most = graph.node("ReduceMax", counts, name="most_chunks", keepdims=0)
    return graph.node("Greater", most, graph.ints("one_scalar", 1), name="has_several_chunks")


def _cut(graph: GraphBuilder, lengths: str, starts: str) -> tuple[_Chunks, str]:
    """Cut bags into chunks, at least one each; also gives the number of chunks per bag, (B,)."""
    zero, one, size = graph.ints("zero", [0]), graph.ints("one", [1]), graph.ints("chunk", [CHUNK])
    padded = graph.node(
        "Add", lengths, graph.ints("chunk_less_one", [CHUNK - 1]), name="lengths_up"
    )
    full = graph.node("Div", padded, size, name="chunks_or_none")
    counts = graph.node("Max", full, one, name="num_chunks")
    most = graph.node("ReduceMax", counts, name="most", keepdims=0)
    nth = graph.node(
        "Range", graph.ints("zero_scalar", 0), most, graph.ints("one_scalar", 1), name="nth"
    )
    column = graph.node("Unsqueeze", counts, one, name="num_chunks_column")
    exists = graph.node("Less", nth, column, name="chunk_exists")
    where = graph.node("NonZero", exists, name="chunks")
    bag, turn = graph.nodes(
        "Split", where, name="split", outputs=(None, None), axis=0, num_outputs=2
    )
    bag = graph.node("Squeeze", bag, zero, name="bag")
    turn = graph.node("Squeeze", turn, zero, name="turn")
    skipped = graph.node("Mul", turn, size, name="skipped")
    first = graph.node(
        "Add", graph.node("Gather", starts, bag, name="start"), skipped, name="first"
    )
    left = graph.node(
        "Sub", graph.node("Gather", lengths, bag, name="length"), skipped, name="left"
    )
    positions, filled = _rectangle(graph, first, left, graph.ints("chunk_scalar", CHUNK))
    return _Chunks(bag=bag, positions=positions, filled=filled), counts


def _rectangle(graph: GraphBuilder, starts: str, lengths: str, width: str) -> tuple[str, str]:
    """Positions of ids, and whether they are filled, both (T, width)."""
    one = graph.ints("one", [1])
    steps = graph.node(
        "Range", graph.ints("zero_scalar", 0), width, graph.ints("one_scalar", 1), name="steps"
    )
    column = graph.node("Unsqueeze", lengths, one, name="lengths_column")
    filled = graph.node("Less", steps, column, name="filled")
    begin = graph.node("Unsqueeze", starts, one, name="starts_column")
    return graph.node("Add", begin, steps, name="positions"), filled


def _pool_first(
    graph: GraphBuilder, lookup: Lookup, bags: _Bags, chunks: _Chunks, ids: str, weights: str | None
) -> str:
    """Read the rows of all chunks and pool each: (T, N)."""
    positions = graph.node(
        "Where", chunks.filled, chunks.positions, bags.count, name="positions_or_end"
    )
    stack = lookup.stack.only(lookup.feature.table)
    rows = read_rows(graph, stack, graph.node("Gather", ids, positions, name="ids"))
    if weights is None:
        each = graph.cast(chunks.filled, "fp32", name="filled_as_fp32")
    else:
        each = graph.node("Gather", weights, positions, name="weights")
    if lookup.feature.pooling == "mean":
        some = graph.node("Max", bags.lengths, graph.ints("one", [1]), name="lengths_or_one")
        if chunks.bag is not None:
            some = graph.node("Gather", some, chunks.bag, name="lengths_of_bags")
        column = graph.node("Unsqueeze", some, graph.ints("one", [1]), name="counts_column")
        each = graph.node(
            "Div",
            each,
            graph.cast(column, "fp32", name="counts"),
            name="shares",
        )
    return weighted_sum(graph, rows, each)
