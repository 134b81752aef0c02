"""The picture of the frontier: what fewer bytes between hosts cost.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmt_convert.documents import Frontier, FrontierPoint
from dmt_convert.report.figures import figure_kind, render_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT: Final = 4.2
_TOWERS, _FLAT, _OWN = "#0b6e6e", "#7d8794", "#c2410c"
_LINEAR_AUC: Final = 1e-4
"""Differences of AUC below this are drawn in proportion, larger ones by their logarithm."""
_LEAST_LOST: Final = 1e-8
"""1 - R^2 that is drawn at the lower edge, if not less is drawn."""


def plot_frontier(path: Path, frontier: Frontier) -> None:
    """Draw a frontier into a .svg or .png file; the same frontier gives the same bytes.

    Args:
        path: The file.
        frontier: The points; the one that was chosen is marked.

    Raises:
        PartitionError: The suffix is neither .svg nor .png.
    """
    kind = figure_kind(path)
    path.write_bytes(_render(kind, frontier, frontier.chosen_point, "chosen"))


def frontier_svg(frontier: Frontier, own: FrontierPoint | None = None) -> str:
    """Draw a frontier as an `<svg>` element, to be embedded in HTML.

    Args:
        frontier: The points.
        own: The model of the bundle, measured on the same rows.
    """
    text = _render("svg", frontier, own, "this bundle").decode("utf-8")
    return text[text.index("<svg") :]


def _render(kind: str, frontier: Frontier, marked: FrontierPoint | None, label: str) -> bytes:
    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        shown = [*frontier.points, *frontier.flat, *([] if marked is None else [marked])]
        scale = _scale(ax, frontier, shown)
        for points, colour, marker, line in (
            (frontier.flat, _FLAT, "s", ""),
            (frontier.points, _TOWERS, "o", "-"),
        ):
            _draw_points(ax, scale, points, colour, marker, line)
        if marked is not None and scale.knows(marked):
            ax.plot(
                [marked.bytes], [scale.value(marked)], "o", ms=13, mfc="none", mec=_OWN, mew=1.8
            )
            ax.annotate(
                label,
                (marked.bytes, scale.value(marked)),
                (12, 11),
                textcoords="offset points",
                color=_OWN,
                fontsize=9,
                fontweight="bold",
            )
        ax.grid(visible=True, which="major", color="#e3e6ea", lw=0.6)
        ax.set_axisbelow(True)

    return render_figure(kind, _HEIGHT, draw)


class _Scale:
    """What is drawn upwards: AUC lost, or else 1 - R^2.

    Args:
        frontier: The points.
        floor: 1 - R^2 of the lower edge.
    """

    def __init__(self, frontier: Frontier, floor: float) -> None:
        self.by_auc, self._floor = frontier.labelled, floor

    def knows(self, point: FrontierPoint) -> bool:
        """Whether a point can be drawn."""
        return point.bytes > 0 and (point.auc_lost if self.by_auc else point.r2) is not None

    def value(self, point: FrontierPoint) -> float:
        """How high it is drawn."""
        if self.by_auc:
            assert point.auc_lost is not None
            return point.auc_lost
        assert point.r2 is not None
        return max(1 - point.r2, self._floor)

    def room(self, point: FrontierPoint) -> float:
        """How much higher it may be, as far as the rows tell."""
        if not self.by_auc or point.auc_bound is None or point.auc_lost is None:
            return 0.0
        return point.auc_bound - point.auc_lost


def _scale(ax: Axes, frontier: Frontier, shown: Sequence[FrontierPoint]) -> _Scale:
    """Set up the axes, many bytes on the left."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    lost = [1 - p.r2 for p in shown if p.r2 is not None and 1 - p.r2 > _LEAST_LOST]
    floor = 10.0 ** (math.floor(math.log10(min(lost, default=_LEAST_LOST))) - 0.3)
    scale = _Scale(frontier, floor)
    ax.set_xscale("log", base=2)
    sizes = [point.bytes for point in shown if scale.knows(point)] or [1]
    ax.set_xlim(max(sizes) * 1.35, min(sizes) / 1.35)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("bytes between hosts per sample (beside the points: bytes as fp32 / bytes)")
    if scale.by_auc:
        ax.set_yscale("symlog", linthresh=_LINEAR_AUC, linscale=0.6)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.axhline(0, color="#444444", lw=0.8)
        ax.set_title("AUC lost (bars: up to the 95 % bound)")
        tops = [scale.value(p) + scale.room(p) for p in shown if scale.knows(p)] or [0.0]
        bottoms = [scale.value(p) for p in shown if scale.knows(p)] or [0.0]
        ax.set_ylim(min(bottoms) * 3 - _LINEAR_AUC / 4, max(tops) * 2 + _LINEAR_AUC / 4)
    else:
        ax.set_yscale("log")
        ax.set_title("1 - R² of the logits (exact models at the lower edge)")
        ax.set_ylim(floor / 4, max([*lost, 10 * floor]) * 3)
    return scale


def _draw_points(
    ax: Axes,
    scale: _Scale,
    points: Sequence[FrontierPoint],
    colour: str,
    marker: str,
    line: str,
) -> None:
    known = [point for point in points if scale.knows(point)]
    ax.errorbar(
        [point.bytes for point in known],
        [scale.value(point) for point in known],
        yerr=[[0.0] * len(known), [scale.room(point) for point in known]],
        color=colour,
        marker=marker,
        ls=line or "none",
        ms=5,
        lw=1.4,
        elinewidth=0.8,
        capsize=2,
    )
    for point in known:
        # the flat model's names go above its points, compressions below theirs
        flat = not line
        ax.annotate(
            point.name if flat else f"/ {point.compression:g}",
            (point.bytes, scale.value(point)),
            (0, 10 if flat else -14),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=7.5,
        )
