"""Rows of stored tables in a graph: found, read, dequantised, pooled.

Letters: B batch, L ids per bag, N embedding dim, I any shape of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.serving.onnx_graph import GraphBuilder
from dmt_convert.serving.placed_weights import PlacedFile

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
