"""Predicted scaling as a picture: step times, and the speed-up over flat."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dmt_convert.errors import ConfigError
from dmt_convert.placement.predict.prediction import ScalePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_RANKS: Final = 512
"""Largest cluster of the DMT paper; what is drawn beyond has never been checked."""
_SUFFIXES: Final = (".png", ".svg")
_LINES: Final = (
    ("flat", "#8a8f98", "o"),
    ("sptt", "#4c78a8", "s"),
    ("dmt", "#e4572e", "D"),
)
_STYLE: Final[dict[str, Any]] = {
    "svg.hashsalt": "dmt-convert",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


def plot_scaling(points: Sequence[ScalePoint], title: str, path: Path) -> None:
    """Draw predicted step times and speed-ups into a .svg or .png file.

    Args:
        points: Sizes of cluster, ascending, at least one.
        title: What was predicted; the word "modelled" is put before it.
        path: Where to.

    Raises:
        ConfigError: The suffix is neither .svg nor .png.
    """
    kind = path.suffix.lower()
    if kind not in _SUFFIXES:
        raise ConfigError(
            f"a plot named {path.name}",
            expected=f"a name that ends in {' or '.join(_SUFFIXES)}",
            hint="rename the plot file",
        )
    path.write_bytes(_render(points, title, kind.removeprefix(".")))


def _render(points: Sequence[ScalePoint], title: str, kind: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style):
        figure = _draw(points, title)
        FigureCanvasAgg(figure)
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def _draw(points: Sequence[ScalePoint], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    times, speedups = figure.subplots(1, 2)
    _draw_times(times, points)
    _draw_speedups(speedups, points)
    for axes in (times, speedups):
        _name_sizes(axes, points)
        _shade_few_towers(axes, points)
    _name_shade(times, points)
    figure.suptitle(
        f"Modelled, not measured: {title}".replace("$", r"\$"), fontsize=10, x=0.01, ha="left"
    )
    return figure


def _labels(points: Sequence[ScalePoint]) -> dict[str, str]:
    compression = max(point.compression for point in points)
    return {
        "flat": "flat",
        "sptt": "SPTT, no compression",
        "dmt": f"DMT, compression {compression:.3g}",
    }


def _draw_times(axes: Axes, points: Sequence[ScalePoint]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    labels = _labels(points)
    for i, (variant, colour, marker) in enumerate(_LINES):
        milliseconds = [point.prediction.steps[i].step.total * 1e3 for point in points]
        ranks = [point.ranks for point in points]
        axes.plot(ranks, milliseconds, color=colour, marker=marker, ms=4.5, label=labels[variant])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Step time")
    axes.set_ylabel("ms per step")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.6, high)
    axes.legend(loc="upper left")


def _draw_speedups(axes: Axes, points: Sequence[ScalePoint]) -> None:
    ranks = [point.ranks for point in points]
    axes.axhline(1.0, color=_LINES[0][1], lw=1.2)
    for i, (_, colour, marker) in enumerate(_LINES):
        if i == 0:
            continue
        values = [point.prediction.steps[i].speedup for point in points]
        axes.plot(ranks, values, color=colour, marker=marker, ms=4.5)
        axes.annotate(
            f"{values[-1]:.2f}",
            (ranks[-1], values[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    top = max(max(p.speedup for p in point.prediction.steps) for point in points)
    axes.set_ylim(0, 1.1 * top)
    if ranks[0] < PAPER_RANKS < ranks[-1]:
        axes.axvline(PAPER_RANKS, color="#7a6f55", lw=1, ls=":")
        axes.annotate(
            f"the paper measured up to {PAPER_RANKS}",
            (PAPER_RANKS, 0.97 * 1.1 * top),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7.5,
            color="#7a6f55",
        )
    axes.set_title("Speed-up over flat")
    axes.set_ylabel("times as fast as flat")


def _name_sizes(axes: Axes, points: Sequence[ScalePoint]) -> None:
    from matplotlib.ticker import NullLocator

    ranks = [point.ranks for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks], rotation=45, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ranks[0] * 0.8, ranks[-1] * 2.4)
    axes.set_xlabel("GPUs (same batch on each)")


def _few_towers(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """Return the smallest cluster where a tower lies on several hosts."""
    return next((point for point in points if point.towers < point.hosts), None)


def _shade_few_towers(axes: Axes, points: Sequence[ScalePoint]) -> None:
    first = _few_towers(points)
    if first is not None:
        axes.axvspan(first.ranks / 2**0.5, axes.get_xlim()[1], color="#f3efe6", zorder=0, lw=0)


def _name_shade(axes: Axes, points: Sequence[ScalePoint]) -> None:
    if _few_towers(points) is not None:
        axes.text(
            0.985,
            0.03,
            "shaded: fewer tables than hosts,\na tower lies on several hosts",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=7.5,
            color="#7a6f55",
        )
