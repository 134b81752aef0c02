"""What capturing a module comes to: features, tables, dense inputs and a graph. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dmt_convert.spec import Pooling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePart:
    """Rows of one tensor of the module."""

    weight: str
    """Name of the tensor in the module's state dict."""
    begin: int
    """First row."""
    end: int
    """Row behind the last one."""
    dim: int
    """Its columns."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """A table of the bundle: parts side by side that the same features are looked up in."""

    name: str
    """Its name."""
    parts: tuple[TablePart, ...]
    """Its parts; all have as many rows."""

    def columns_of(self, part: TablePart) -> range:
        """Return which columns of the table are a part's."""
        begin = 0
        for other in self.parts:
            if other == part:
                return range(begin, begin + part.dim)
            begin += other.dim
        raise AssertionError(part)

    @property
    def dim(self) -> int:
        """Width of the table."""
        return sum(part.dim for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePlan:
    """A feature of the bundle, and where the module's inputs hold its ids."""

    name: str
    """Its name."""
    table: TablePlan
    """Its table."""
    pooling: Pooling
    """How rows become one vector."""
    source: int
    """Index of the input."""
    columns: tuple[int, ...]
    """Columns of the input, flattened per row, whose ids make a bag; key of a jagged input."""
    single: bool
    """Whether it is one id."""
    padding: int | None = None
    """Id that stands for no id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseColumn:
    """A dense input of the bundle, and where the module's inputs hold it."""

    name: str
    """Its name."""
    source: int
    """Index of the input."""
    column: int
    """Column of the input, flattened per row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """A module that was captured and checked."""

    name: str
    """Name of its class."""
    features: tuple[FeaturePlan, ...]
    """Features in the order in which the graph takes them."""
    dense: tuple[DenseColumn, ...]
    """Dense inputs in the order in which the graph takes them."""
    config: Mapping[str, Any]
    """The graph, as `network.config` of a bundle."""
    weights: Mapping[str, Tensor]
    """Weights of the graph."""
    final_sigmoid: bool
    """Whether the module ends in a sigmoid, which the graph leaves out."""
    notes: tuple[tuple[str, str, str], ...]
    """What else is worth knowing: subject, value and reason."""

    @property
    def tables(self) -> tuple[TablePlan, ...]:
        """All tables, in the order of the features."""
        return tuple(dict.fromkeys(feature.table for feature in self.features))
