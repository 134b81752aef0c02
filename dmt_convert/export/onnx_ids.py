"""Ids of one feature in a graph, kept inside their table."""

from __future__ import annotations

from dataclasses import dataclass

from dmt_convert.export.onnx_graph import GraphBuilder
from dmt_convert.export.onnx_tables import TableStack
from dmt_convert.serving import FeatureInput
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


def checked_ids(b: GraphBuilder, lookup: Lookup, ids: str) -> str:
    """Return ids of any shape such that reading their rows fails where one is outside the table.

    Runtimes refuse ids behind a table's end, but take negative ones from there backwards: these are
    moved to just behind the end.
    """
    if lookup.clip:
        low, high = b.ints("id_low", 0), b.ints("id_high", lookup.rows - 1)
        return b.node("Clip", ids, low, high, name="ids_clipped")
    negative = b.node("Less", ids, b.ints("zero", [0]), name="ids_below_zero")
    behind = b.ints("behind_the_end", [lookup.rows])
    return b.node("Where", negative, behind, ids, name="ids_or_behind_the_end")
