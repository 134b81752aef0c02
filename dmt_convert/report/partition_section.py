"""How the towers came about: affinity before and after, as a picture."""

from __future__ import annotations

from dmt_convert.report.markup import Html, escape, paragraph, section, tag
from dmt_convert.report.partition_figure import embed_figure
from dmt_convert.report.quantities import plural, show_factor
from dmt_convert.report.report_data import ReportData

_STRATEGIES = {
    "coherent": "features that interact sit together",
    "diverse": "features that interact sit apart",
    "round-robin": "feature i sits in tower i mod T",
    "file": "the towers were given in a file",
}


def render_partition(data: ReportData) -> Html:
    """The partition section."""
    partition = data.partition
    shown = (
        "Affinity of all pairs in model order and ordered by tower (framed), and what every tower "
        "costs."
        if partition.affinity is not None
        else "What every tower costs."
        if data.figure is None or partition.affinity_kind is None
        else "The partition, as it was drawn when the flat model was converted."
    )
    figure = tag(
        "figure",
        tag(
            "div",
            embed_figure(
                data.spec.flat,
                partition,
                description=f"{shown} {_affinity(data)}",
                drawn=data.figure,
            ),
            class_="card",
            tabindex="0",
            role="group",
            aria_label="Partition figure, scrolls sideways",
        ),
        tag("figcaption", escape(shown)),
    )
    meaning = _STRATEGIES.get(partition.strategy)
    strategy = f"Strategy {partition.strategy}" + (f": {meaning}. " if meaning else ". ")
    return section(
        "partition",
        "Partition",
        paragraph(escape(strategy + _affinity(data))),
        figure,
    )


def _affinity(data: ReportData) -> str:
    partition = data.partition
    if partition.affinity_kind is None:
        return (
            "There is no affinity matrix to show: this strategy does not go by affinity, and none "
            "was measured."
        )
    kind, inside, between = (
        partition.affinity_kind,
        partition.within_affinity,
        partition.between_affinity,
    )
    if inside is None:
        return "No two features share a tower, so there is no affinity inside towers."
    if between is None:
        return (
            f"Mean {kind} affinity of two features is {inside:.3f}; with "
            f"{plural(len(data.spec.towers), 'tower')} there are no pairs between towers."
        )
    ratio = f" ({show_factor(inside / between)})" if between > 0 else ""
    return (
        f"Mean {kind} affinity of two features is {inside:.3f} inside a tower and {between:.3f} "
        f"between towers{ratio}."
    )
