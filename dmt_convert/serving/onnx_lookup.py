"""From bags of ids to pooled embeddings, in a graph.

Letters: B batch, F features, L ids per bag, N embedding dim, M widths' sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dmt_convert.serving.exporter import ExportJob
from dmt_convert.serving.graph_inputs import PADDING, GraphInputs
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.onnx_jagged import can_stack, pool_jagged, pool_jagged_stack
from dmt_convert.serving.onnx_tables import (
    Lookup,
    TableStack,
    checked_ids,
    find_stacks,
    plain_rows,
    read_rows,
    stacked_ids,
    weighted_sum,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Pooled embeddings of some features, side by side."""

    tensor: str
    """Shape (B, sum of dims)."""
    features: tuple[str, ...]
    """Whose they are."""
    dims: tuple[int, ...]
    """N of each."""


def add_inputs(
    graph: GraphBuilder, inputs: GraphInputs, features: Sequence[str] | None = None
) -> None:
    """Add the inputs of some features, in the model's order.

    Args:
        graph: The graph.
        inputs: All inputs.
        features: Whose; by default all, and the dense inputs before them.
    """
    if features is None:
        add_dense_input(graph, inputs)
    for feature in inputs.features:
        if features is not None and feature.feature not in features:
            continue
        name, rows = feature.feature, rows_of(inputs, feature.feature)
        if feature.form == "jagged":
            graph.input(feature.ids, "int64", [f"ids of {name}"])
            graph.input(f"{name}.lengths", "int64", [rows])
            shape: list[int | str] = [f"ids of {name}"]
        else:
            shape = [rows, 1 if feature.form == "single" else f"ids per bag of {name}"]
            graph.input(feature.ids, "int64", shape)
        if feature.weights is not None:
            graph.input(feature.weights, "fp32", shape)


def add_dense_input(graph: GraphBuilder, inputs: GraphInputs) -> None:
    """Add the dense input, if there is one."""
    if inputs.num_dense:
        rows = 1 if inputs.dense_per_request else "batch"
        graph.input(inputs.dense, "fp32", [rows, inputs.num_dense])


def rows_of(inputs: GraphInputs, feature: str) -> int | str:
    """Rows in which a feature's bags come: one where they come once per request."""
    return 1 if feature in inputs.per_request else "batch"


def pool_tower(graph: GraphBuilder, job: ExportJob, tower: int) -> list[Piece]:
    """Look up and pool the features of a tower; the pieces are in the tower's order."""
    lookups = _lookups(job, tower)
    pooled: dict[str, str] = {}
    jagged = [lookup for lookup in lookups if lookup.input.form == "jagged"]
    if jagged == lookups and can_stack(lookups):
        return [_piece(pool_jagged_stack(graph, lookups), lookups)]
    if jagged:
        tensors = pool_jagged(graph, jagged)
        pooled = {look.feature.name: name for look, name in zip(jagged, tensors, strict=True)}
    pieces = []
    for _, members in groupby(lookups, key=_stacked_with):
        group = tuple(members)
        if group[0].input.form == "single":
            tensor = _pool_single(graph, group)
        else:
            (lookup,) = group
            name = lookup.feature.name
            tensor = pooled[name] if name in pooled else _pool_rectangle(graph, lookup)
        pieces.append(_piece(tensor, group))
    return pieces


def _piece(tensor: str, group: Sequence[Lookup]) -> Piece:
    return Piece(
        tensor=tensor,
        features=tuple(lookup.feature.name for lookup in group),
        dims=tuple(lookup.stack.dim for lookup in group),
    )


def join(graph: GraphBuilder, pieces: Sequence[Piece], output: str | None = None) -> str:
    """Put pieces side by side: (B, M)."""
    tensors = [piece.tensor for piece in pieces]
    if len(tensors) > 1:
        return graph.node("Concat", *tensors, name="joined", output=output, axis=1)
    return (
        tensors[0]
        if output is None
        else graph.node("Identity", *tensors, name="joined", output=output)
    )


def _lookups(job: ExportJob, tower: int) -> list[Lookup]:
    spec = job.spec.flat
    features = {feature.name: feature for feature in spec.features}
    stacks = find_stacks(
        job.weights.towers[tower], {table.name: table.dim for table in spec.tables}
    )
    return [
        Lookup(
            feature=features[name],
            input=job.inputs.feature(name),
            stack=stacks[features[name].table],
            rows=spec.table_of(name).rows,
            clip=job.config.out_of_range == "clip",
        )
        for name in job.spec.towers[tower].features
    ]


def _stacked_with(lookup: Lookup) -> tuple[object, ...]:
    """What neighbours have in common that are looked up in one go."""
    if lookup.input.form == "single":
        return ("single", lookup.stack.tables, lookup.input.weighted)
    return (lookup.feature.name,)


def _pool_single(graph: GraphBuilder, group: Sequence[Lookup]) -> str:
    """Look up one id per feature and row in a stack of tables: (B, F * N)."""
    stack = group[0].stack
    with graph.scope("single"):
        ids = _side_by_side(graph, [lookup.input.ids for lookup in group], "ids")
        rows = read_rows(graph, stack, stacked_ids(graph, group, ids, axis=1))
        values = plain_rows(graph, rows)
        if group[0].input.weighted:
            weights = _side_by_side(
                graph, [str(lookup.input.weights) for lookup in group], "weights"
            )
            weights = _of_the_shape_of(graph, weights, ids)
            last = graph.ints("last_axis", [-1])
            column = graph.node("Unsqueeze", weights, last, name="weights_of_rows")
            values = graph.node("Mul", values, column, name="weighted_rows")
        shape = graph.ints("flat", [-1, len(group) * stack.dim])
        return graph.node("Reshape", values, shape, name="pooled")


def _side_by_side(graph: GraphBuilder, tensors: Sequence[str], name: str) -> str:
    return tensors[0] if len(tensors) == 1 else graph.node("Concat", *tensors, name=name, axis=1)


def _of_the_shape_of(graph: GraphBuilder, weights: str, ids: str) -> str:
    """Make the graph fail unless every id has a weight; runtimes would repeat a single weight."""
    shape = graph.node("Shape", ids, name="shape_of_ids")
    return graph.node("Reshape", weights, shape, name="one_weight_per_id")


def _pool_rectangle(graph: GraphBuilder, lookup: Lookup) -> str:
    """Pool fixed or padded bags, (B, L), of one feature: (B, N)."""
    with graph.scope(lookup.feature.name):
        ids = lookup.input.ids
        weights = lookup.input.weights
        if weights is not None:
            weights = _of_the_shape_of(graph, weights, ids)
        mean = lookup.feature.pooling == "mean"
        one = graph.ints("axis_1", [1])
        stack: TableStack = lookup.stack.only(lookup.feature.table)
        if lookup.input.form == "fixed":
            rows = read_rows(graph, stack, checked_ids(graph, lookup, ids))
            if weights is None:
                op = "ReduceMean" if mean else "ReduceSum"
                return graph.node(op, plain_rows(graph, rows), one, name="pooled", keepdims=0)
            pooled = weighted_sum(graph, rows, weights)
            if not mean:
                return pooled
            shape = graph.node("Shape", ids, name="ids_per_bag", start=1)
            count = graph.cast(shape, "fp32", name="ids_per_bag_as_fp32")
            return graph.node("Div", pooled, count, name="mean")
        padding = graph.node("Equal", ids, graph.ints("padding", [PADDING]), name="padding")
        kept = graph.node(
            "Where", padding, graph.ints("zero", [0]), ids, name="ids_without_padding"
        )
        rows = read_rows(graph, stack, checked_ids(graph, lookup, kept))
        filled = graph.node("Not", padding, name="filled")
        counts = graph.cast(filled, "fp32", name="filled_as_fp32")
        each = counts
        if weights is not None:
            each = graph.node("Where", filled, weights, graph.floats("zero", [0]), name="weights")
        if mean:
            total = graph.node("ReduceSum", counts, one, name="ids_per_bag", keepdims=1)
            some = graph.node("Max", total, graph.floats("one", [1]), name="ids_or_one")
            each = graph.node("Div", each, some, name="shares")
        return weighted_sum(graph, rows, each)
