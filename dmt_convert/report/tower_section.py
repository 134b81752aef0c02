"""The towers, one by one: features, size, what they emit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmt_convert.conversion.partition import TowerLoad, tower_colours
from dmt_convert.model import TowerModuleSpec
from dmt_convert.report.markup import (
    Html,
    bar,
    details,
    escape,
    join,
    name_of,
    paragraph,
    section,
    table,
    tag,
)
from dmt_convert.report.quantities import plural, show_bytes, show_factor, show_number, show_share
from dmt_convert.report.report_data import ReportData

_MAX_SHOWN: Final = 40
"""A tower of more features shows the first, and the rest on demand."""
_MANY: Final = 400
"""In a model of more features, every tower does."""
_FIRST: Final = 6

_COLUMNS: Final = ("Tower", "Features", "Tables", "Lookups", "Elements out", "Module")


def render_towers(data: ReportData) -> Html:
    """The towers section."""
    loads = data.partition.loads
    colours = tower_colours(len(loads))
    table_bytes = [float(load.table_bytes) for load in loads]
    lookups = [load.lookups for load in loads]
    widths = [float(width) for width in data.spec.tower_widths]
    limit = _MAX_SHOWN if len(data.spec.flat.features) <= _MANY else _FIRST
    rows = [
        (
            _swatch(t, colours[t]),
            _features(data.spec.towers[t].features, limit),
            _measure(table_bytes, t, show_bytes(table_bytes[t]), colours[t]),
            _measure(lookups, t, show_number(lookups[t]), colours[t]),
            _elements(data, widths, t, colours[t]),
            escape(_module(data.spec.towers[t].module)),
        )
        for t in range(len(loads))
    ]
    return section(
        "towers",
        "Towers",
        paragraph(escape(_balance(loads, widths))),
        table(
            "Every tower: its features, the bytes of its tables, ids looked up per sample, and "
            "elements per sample before → after its module; percentages are shares of all towers",
            _COLUMNS,
            rows,
            class_="towers",
        ),
    )


def _swatch(tower: int, colour: str) -> Html:
    mark = tag("span", class_="swatch", style=f"background:{colour}", aria_hidden="true")
    return join([mark, escape(str(tower))])


def _features(names: Sequence[str], limit: int) -> Html:
    count = tag("span", escape(plural(len(names), "feature")), class_="muted count")
    if len(names) <= limit:
        return join([count, _list(names)])
    more = details(f"and {show_number(len(names) - _FIRST)} more", _list(names[_FIRST:]))
    return join([count, _list(names[:_FIRST]), more])


def _list(names: Sequence[str]) -> Html:
    return tag("ul", join(tag("li", name_of(name)) for name in names), class_="names")


def _measure(values: Sequence[float], tower: int, shown: str, colour: str) -> Html:
    return join(
        [
            tag("span", escape(shown)),
            tag("small", escape(show_share(values[tower], sum(values)))),
            bar(values[tower] / max(values) if max(values) else 0.0, colour=colour),
        ]
    )


def _elements(data: ReportData, widths: Sequence[float], tower: int, colour: str) -> Html:
    before = sum(data.spec.tower_dims(tower))
    return _measure(widths, tower, f"{show_number(before)} → {show_number(widths[tower])}", colour)


def _module(module: TowerModuleSpec) -> str:
    if module.kind == "dlrm":
        return f"dlrm, c={module.c}, p={module.p}, D={module.dim}"
    if module.kind == "dcn":
        layers = plural(module.cross_layers, "cross layer")
        return f"dcn, D={module.dim}, {layers} of rank {module.cross_rank}"
    if module.kind == "linear":
        return f"linear, D={module.dim}"
    return "passthrough (identity)"


def _balance(loads: Sequence[TowerLoad], widths: Sequence[float]) -> str:
    if len(loads) == 1:
        return "One tower holds all features: nothing is parted."
    measures = (
        ("features", [float(load.features) for load in loads]),
        ("table bytes", [float(load.table_bytes) for load in loads]),
        ("lookups", [load.lookups for load in loads]),
        ("elements out", widths),
    )
    said = [
        f"{name} {show_factor(max(values) * len(values) / sum(values))}"
        for name, values in measures
        if sum(values) > 0
    ]
    return f"The largest tower over the mean tower (1.00× is even): {', '.join(said)}."
