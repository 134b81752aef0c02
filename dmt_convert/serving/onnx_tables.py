"""Rows of stored tables in a graph: ids kept inside their tables; rows read, dequantised, pooled.

Letters: B batch, F features, L ids per bag, N embedding dim, I any shape of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.serving.graph_inputs import FeatureInput
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.placed_weights import PlacedFile
from dmt_convert.spec import FeatureSpec

_LOW_NIBBLE: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStack:
    """Tables that lie one behind the other in a file and have one width and one element type."""

    file: PlacedFile
    """Where they are stored."""
    tables: tuple[str, ...]
    """Their names, in the order of the file."""
    rows: tuple[int, ...]
    """Rows of each."""
    dim: int
    """N."""
    quantized: bool
    """Whether a row is integers, a scale and a zero point."""

    def first_row(self, table: str) -> int:
        """Where a table begins in the stack, in rows."""
        return sum(self.rows[: self.tables.index(table)])

    def only(self, table: str) -> TableStack:
        """Return a stack of one of the tables."""
        rows = self.rows[self.tables.index(table)]
        return TableStack(
            file=self.file, tables=(table,), rows=(rows,), dim=self.dim, quantized=self.quantized
        )

    def tensor(self, graph: GraphBuilder, kind: str) -> str:
        """Return one tensor of all rows, which stays in its file.

        Args:
            graph: The graph.
            kind: weight; or quantized, scale, zero_point.
        """
        name = f"tables.{self.tables[0]}.{kind}"
        return graph.weight(
            self.file, name, shape=(sum(self.rows), *self.file.weight(name).shape[1:])
        )

    def dtype(self, kind: str) -> str:
        """Element type of one of its tensors."""
        return self.file.weight(f"tables.{self.tables[0]}.{kind}").dtype


def find_stacks(file: PlacedFile, dims: dict[str, int]) -> dict[str, TableStack]:
    """Return the stack of every table of a file.

    Args:
        file: A tower's weights.
        dims: N of every table.
    """
    groups: list[list[str]] = []
    for table in _in_order(file):
        last = groups[-1] if groups else None
        if last is not None and dims[last[-1]] == dims[table] and _adjoin(file, last[-1], table):
            last.append(table)
        else:
            groups.append([table])
    stacks = {}
    for group in groups:
        stack = TableStack(
            file=file,
            tables=tuple(group),
            rows=tuple(next(iter(_kinds(file, table).values())).shape[0] for table in group),
            dim=dims[group[0]],
            quantized="quantized" in _kinds(file, group[0]),
        )
        stacks.update(dict.fromkeys(group, stack))
    return stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows that a graph has read: values, or integers with a scale and a zero point per row."""

    values: str
    """Float32, shape (*I, N)."""
    scale: str | None = None
    """Shape I."""
    zero_point: str | None = None
    """Shape I, as float32."""


def read_rows(graph: GraphBuilder, stack: TableStack, ids: str) -> Rows:
    """Read rows of tables; an id outside them makes the graph fail, unless it is negative.

    Args:
        graph: The graph.
        stack: The tables.
        ids: Rows in the stack, int64, shape I; not negative.
    """
    if not stack.quantized:
        values = graph.node("Gather", stack.tensor(graph, "weight"), ids, name="rows")
        if stack.dtype("weight") != "fp32":
            values = graph.cast(values, "fp32", name="rows_as_fp32")
        return Rows(values=values)
    codes = graph.node("Gather", stack.tensor(graph, "quantized"), ids, name="rows")
    if stack.file.weight(f"tables.{stack.tables[0]}.quantized").shape[1] != stack.dim:
        codes = _unpack_nibbles(graph, codes, stack.dim)
    zero = graph.node("Gather", stack.tensor(graph, "zero_point"), ids, name="zero_points")
    return Rows(
        values=graph.cast(codes, "fp32", name="codes_as_fp32"),
        scale=graph.node("Gather", stack.tensor(graph, "scale"), ids, name="scales"),
        zero_point=graph.cast(zero, "fp32", name="zero_points_as_fp32"),
    )


def plain_rows(graph: GraphBuilder, rows: Rows) -> str:
    """Return the rows' values, shape (*I, N)."""
    if rows.scale is None or rows.zero_point is None:
        return rows.values
    last = graph.ints("last_axis", [-1])
    zero = graph.node("Unsqueeze", rows.zero_point, last, name="zero_points_of_rows")
    scale = graph.node("Unsqueeze", rows.scale, last, name="scales_of_rows")
    shifted = graph.node("Sub", rows.values, zero, name="shifted_rows")
    return graph.node("Mul", shifted, scale, name="scaled_rows")


def weighted_sum(graph: GraphBuilder, rows: Rows, weights: str) -> str:
    """Add up rows: (B, L, N) to (B, N).

    Args:
        graph: The graph.
        rows: The rows.
        weights: What every row counts, shape (B, L).
    """
    if rows.scale is not None:
        weights = graph.node("Mul", weights, rows.scale, name="scaled_weights")
    one = graph.ints("axis_1", [1])
    row = graph.node("Unsqueeze", weights, one, name="weights_as_row")
    total = graph.node("MatMul", row, rows.values, name="weighted_sum")
    pooled = graph.node("Squeeze", total, one, name="pooled")
    if rows.zero_point is None:
        return pooled
    zeros = graph.node("Mul", weights, rows.zero_point, name="weighted_zero_points")
    shift = graph.node("ReduceSum", zeros, one, name="shift", keepdims=1)
    return graph.node("Sub", pooled, shift, name="pooled_and_shifted")


def _unpack_nibbles(graph: GraphBuilder, packed: str, dim: int) -> str:
    """Split bytes into their low nibbles (the first half of the columns) and their high ones."""
    low = graph.node(
        "BitwiseAnd", packed, graph.bytes("low_nibble", _LOW_NIBBLE), name="low_nibbles"
    )
    high = graph.node(
        "BitShift", packed, graph.bytes("four", 4), name="high_nibbles", direction="RIGHT"
    )
    codes = graph.node("Concat", low, high, name="codes", axis=-1)
    if dim % 2 == 0:
        return codes
    return graph.node(
        "Slice",
        codes,
        graph.ints("zero", [0]),
        graph.ints("dim", [dim]),
        graph.ints("last_axis", [-1]),
        name="codes_without_filler",
    )


def _in_order(file: PlacedFile) -> Sequence[str]:
    """Tables of a file, by where they are stored."""
    begins = {}
    for name in file.tensors:
        if name.startswith("tables.") and name.endswith((".weight", ".quantized")):
            begins[name.removeprefix("tables.").rpartition(".")[0]] = file.offset(name)
    return sorted(begins, key=begins.__getitem__)


def _kinds(file: PlacedFile, table: str) -> dict[str, TensorInfo]:
    kinds = ("weight", "quantized", "scale", "zero_point")
    return {
        kind: file.weight(f"tables.{table}.{kind}")
        for kind in kinds
        if f"tables.{table}.{kind}" in file.tensors
    }


def _adjoin(file: PlacedFile, table: str, other: str) -> bool:
    """Whether all tensors of another table begin where those of a table end."""
    kinds, others = _kinds(file, table), _kinds(file, other)
    return kinds.keys() == others.keys() and all(
        info.dtype == others[kind].dtype
        and info.shape[1:] == others[kind].shape[1:]
        and file.offset(f"tables.{table}.{kind}") + info.nbytes
        == file.offset(f"tables.{other}.{kind}")
        for kind, info in kinds.items()
    )


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
