"""Where towers and tables go, and what the links carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmt_convert.conversion.partition import tower_colours
from dmt_convert.placement import TowerPlan
from dmt_convert.report.markup import (
    EMPTY,
    Html,
    bar,
    definitions,
    details,
    escape,
    join,
    paragraph,
    section,
    table,
    tag,
)
from dmt_convert.report.quantities import (
    plural,
    show_bytes,
    show_factor,
    show_number,
    show_seconds,
    show_share,
)
from dmt_convert.report.report_data import ReportData

SAMPLES_PER_RANK: Final = 4096
"""Batch of one rank that the modelled times are for."""

_MAX_HOSTS: Final = 64
"""More hosts are shown on demand."""
_MAX_CELLS: Final = 16
"""More ranks per host are not drawn one by one."""


def render_plan(data: ReportData) -> Html:
    """The plan section."""
    plan = data.plan
    return section(
        "plan",
        "Plan",
        _cluster(plan),
        _hosts(data),
        tag("h3", escape("Communication, modelled")),
        _times(plan),
        _exchanges(plan),
    )


def _cluster(plan: TowerPlan) -> Html:
    cluster = plan.cluster
    fullest = max(plan.bytes_per_rank)
    return definitions(
        [
            (
                "Cluster",
                escape(
                    f"{plural(cluster.hosts, 'host')} × {plural(cluster.ranks_per_host, 'rank')} "
                    f"= {plural(cluster.world_size, 'rank')}"
                ),
            ),
            (
                "Memory of a rank",
                escape(
                    f"{show_bytes(cluster.hbm_bytes)}, of which tables and optimizer state may "
                    f"use {show_bytes(cluster.usable_bytes)}"
                ),
            ),
            (
                "Fullest rank",
                escape(
                    f"{show_bytes(fullest)} ({show_share(fullest, cluster.usable_bytes)} of that)"
                ),
            ),
            (
                "Links of a rank",
                escape(
                    f"{show_number(cluster.intra_gbps)} Gbit/s inside the host, "
                    f"{show_number(cluster.inter_gbps)} Gbit/s to other hosts"
                ),
            ),
        ]
    )


def _hosts(data: ReportData) -> Html:
    plan = data.plan
    towers_on: list[list[int]] = [[] for _ in range(plan.cluster.hosts)]
    for tower, hosts in enumerate(plan.tower_hosts):
        for host in hosts:
            towers_on[host].append(tower)
    colours = tower_colours(len(plan.tower_hosts))
    rows = [_host(plan, host, towers, colours) for host, towers in enumerate(towers_on)]
    first = _host_table("Towers and bytes of every host", rows[:_MAX_HOSTS])
    if len(rows) <= _MAX_HOSTS:
        return first
    rest = _host_table("Towers and bytes of the other hosts", rows[_MAX_HOSTS:])
    return join([first, details(f"and {len(rows) - _MAX_HOSTS} more hosts", rest)])


def _host_table(caption: str, rows: Sequence[Sequence[Html]]) -> Html:
    return table(
        f"{caption}: tables with row-wise Adagrad state",
        ("Host", "Towers", "Bytes", "Of the host's memory", "Ranks"),
        rows,
        numeric=(2,),
        class_="hosts",
    )


def _host(
    plan: TowerPlan, host: int, towers: Sequence[int], colours: Sequence[str]
) -> Sequence[Html]:
    cluster = plan.cluster
    size = cluster.ranks_per_host
    used = plan.bytes_per_host[host]
    room = cluster.usable_bytes * size
    ranks = plan.bytes_per_rank[host * size : (host + 1) * size]
    chips = join(
        tag(
            "li",
            tag("span", class_="swatch", style=f"background:{colours[t]}", aria_hidden="true"),
            escape(str(t)),
        )
        for t in towers
    )
    return (
        escape(str(host)),
        tag("ul", chips, class_="chips"),
        escape(show_bytes(used)),
        join([bar(used / room, kind="dmt"), tag("small", escape(show_share(used, room)))]),
        _ranks(ranks),
    )


def _ranks(ranks: Sequence[int]) -> Html:
    """A column per rank, relative to the fullest of the host; the range in words."""
    top = max(ranks)
    words = (
        f"{show_bytes(min(ranks))} to {show_bytes(top)}" if min(ranks) < top else show_bytes(top)
    )
    if len(ranks) > _MAX_CELLS or top == 0:
        return escape(words)
    cells = join(tag("span", style=f"height:{100 * used / top:.0f}%") for used in ranks)
    drawn = tag("span", cells, class_="ranks", aria_hidden="true")
    return join([drawn, tag("small", escape(f"{words} each"))])


def _times(plan: TowerPlan) -> Html:
    estimate = plan.estimate(SAMPLES_PER_RANK)
    flat, dmt = estimate.flat_seconds, estimate.dmt_seconds
    top = max(flat, dmt)
    if top <= 0:
        return paragraph(escape("One rank holds everything: nothing is exchanged."))
    faster = f" Towers: {show_factor(flat / dmt)} as fast as flat." if dmt > 0 else ""
    note = (
        f"Predicted from link speeds, not measured: time of all exchanges of one step, forward "
        f"and backward, at {show_number(SAMPLES_PER_RANK)} samples per rank.{faster} Bandwidth "
        "only: no latency, no congestion, no overlap with computation, dense gradients left out."
    )
    rows = (("flat", flat, "flat"), ("towers", dmt, "dmt"))
    bars = join(
        tag(
            "div",
            tag("span", escape(label)),
            bar(value / top, kind=kind),
            tag("span", escape(show_seconds(value)), class_="number"),
            class_="bar-row",
        )
        for label, value, kind in rows
    )
    return tag("figure", tag("figcaption", escape(note)), bars, class_="bars")


def _exchanges(plan: TowerPlan) -> Html:
    traffic = plan.traffic
    exchanges = (
        ("flat: ids to the ranks of their tables", traffic.flat_indices),
        ("flat: pooled embeddings back", traffic.flat_embeddings),
        ("towers: ids to the peers", traffic.peer_indices),
        ("towers: ids inside the tower's hosts", traffic.tower_indices),
        ("towers: pooled embeddings inside the tower's hosts", traffic.tower_embeddings),
        ("towers: tower outputs to the peers", traffic.tower_outputs),
    )
    if all(e.cross_bytes == 0 and e.intra_bytes == 0 for _, e in exchanges):
        return EMPTY
    rows = [
        (
            escape(name),
            escape(show_bytes(exchange.cross_bytes)),
            escape(show_bytes(exchange.intra_bytes)),
        )
        for name, exchange in exchanges
    ]
    shown = table(
        "What the busiest rank sends or receives per sample of its own batch, one direction",
        ("Exchange", "To other hosts", "Inside the host"),
        rows,
        numeric=(1, 2),
    )
    return details("Exchanges one by one", shown)
