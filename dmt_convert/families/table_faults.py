"""Which tables are wrong or missing, where the rest of the model tells.

A table of another dim, or one that is not there, shows in the widths of the network behind it.
What is to blame is named, not every layer that follows from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.widths import ShapeReader
from dmt_convert.spec import InteractionKind, InteractionSpec, TableSpec


def blame_tables(
    shapes: ShapeReader,
    family: Architecture,
    tables: Sequence[TableSpec],
    kind: InteractionKind | None,
    *,
    dense: int,
    over: int,
) -> bool:
    """Note tables of a wrong dim and tables that are missing, if they explain the widths.

    Args:
        shapes: Takes what is found.
        family: The family.
        tables: All tables that are there, one per feature.
        kind: Interaction that has parameters of its own, None for dot or cat.
        dense: Output width of dense_arch.
        over: Input width of over_arch.

    Returns:
        Whether any was noted.
    """
    if _sums_up(shapes, family, tables, kind, dense=dense, over=over):
        return False
    dim, votes = Counter(table.dim for table in tables).most_common(1)[0]
    odd = [table for table in tables if table.dim != dim]
    fits = _width_test(shapes, family, kind, dim=dim, dense=dense, over=over)
    gaps: list[str] = []
    if not fits(len(tables)):
        gaps = next((g for g in _gaps([t.name for t in tables]) if fits(len(tables) + len(g))), [])
        if not gaps:
            return False
    elif 2 * votes <= len(tables):
        return False
    shapes.missing += [shapes.source_name(f"tables.{name}.weight") for name in gaps]
    shapes.wrong += [
        f"{shapes.source_name(f'tables.{table.name}.weight')} has shape "
        f"{[table.rows, table.dim]}, expected {[table.rows, dim]}"
        for table in odd
    ]
    return bool(gaps or odd)


def _sums_up(
    shapes: ShapeReader,
    family: Architecture,
    tables: Sequence[TableSpec],
    kind: InteractionKind | None,
    *,
    dense: int,
    over: int,
) -> bool:
    """Tell whether the tables as they are fit side by side, whatever their dims."""
    width = shapes.input_width("cross") if kind == "dcn" else over
    side_by_side = kind == "dcn" or (kind is None and "cat" in family.interactions)
    return side_by_side and dense + sum(table.dim for table in tables) == width


def _width_test(
    shapes: ShapeReader,
    family: Architecture,
    kind: InteractionKind | None,
    *,
    dim: int,
    dense: int,
    over: int,
) -> Callable[[int], bool]:
    """Return what tells whether so many features of `dim` make the network's widths."""
    if kind is not None:
        width = shapes.input_width("cross" if kind == "dcn" else "branch1")
        return lambda count: dense + count * dim == width
    kinds = [InteractionSpec(kind="cat")] if "cat" in family.interactions else []
    if "dot" in family.interactions and dense == dim:
        own = (False, True) if family.allows_self_pairs else (False,)
        kinds += [InteractionSpec(kind="dot", self_pairs=pairs) for pairs in own]
    return lambda count: any(k.output_width([dense, *[dim] * count]) == over for k in kinds)


def _gaps(names: Sequence[str]) -> list[list[str]]:
    """Names that a numbered sequence of tables skips: inside it, then also a number 0."""
    found = [re.fullmatch(r"(\D*)(\d{1,9})(\D*)", name) for name in names]
    parts = {(match[1], match[3]) for match in found if match is not None}
    if None in found or len(parts) != 1:
        return []
    before, after = parts.pop()
    numbers = {int(match[2]) for match in found if match is not None}
    if max(numbers) > 4 * len(numbers) + 4:
        return []
    own = [
        [f"{before}{n}{after}" for n in range(first, max(numbers)) if n not in numbers]
        for first in (min(numbers), 0)
    ]
    return [gap for gap in own if gap]
