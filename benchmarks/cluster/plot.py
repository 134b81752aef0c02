"""Speed-up over flat against the link rate, one panel per topology."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .results import Row
from .settings import Settings, VariantName, parse_variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Final[dict[str, Any]] = {
    "svg.hashsalt": "dmt-convert",
    "svg.fonttype": "none",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLOURS: Final = {
    1: "#555555",
    2: "#4c9f70",
    4: "#3a6ea5",
    8: "#b5493b",
    16: "#c98a1b",
    32: "#7a7a1f",
}
_OTHER_COLOUR: Final = "#8a5fa8"


def plot_speedup(rows: Sequence[Row], settings: Settings, paths: Sequence[Path]) -> None:
    """Draw the figure into files, of the kind that their suffixes say.

    Args:
        rows: Of all topologies.
        settings: Of the run.
        paths: Such as speedup.svg and speedup.png.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    topologies = list(dict.fromkeys(row.topology for row in rows))
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(1.6 + 3.0 * len(topologies), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(topologies), sharey=True, squeeze=False)[0]
        labels: dict[str, Any] = {}
        for panel, topology in zip(panels, topologies, strict=True):
            _draw(panel, [row for row in rows if row.topology == topology], settings, labels)
            panel.set_title(f"{topology} hosts x ranks")
        panels[0].set_ylabel("speed-up over flat of the same precision")
        figure.legend(list(labels.values()), list(labels), loc="outside right upper", frameon=False)
        figure.supxlabel(_caption(settings), fontsize=7)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)


def _draw(panel: Axes, rows: Sequence[Row], settings: Settings, labels: dict[str, Any]) -> None:
    panel.axhline(1.0, color="#aaaaaa", linewidth=0.8)
    for name in settings.variants:
        mine = [
            (row.rate_mbit, row.over_flat, row.cpu_bound)
            for row in rows
            if row.variant == name and row.over_flat is not None
        ]
        parsed = parse_variant(name, dim=settings.dim)
        if parsed.family == "flat" or not mine:
            continue
        colour = _COLOURS.get(parsed.compression, _OTHER_COLOUR)
        (line,) = panel.plot(
            *zip(*[m[:2] for m in mine], strict=True),
            color=colour,
            linestyle=_dashes(parsed),
            linewidth=1.2,
        )
        labels.setdefault(name, line)
        for rate, ratio, cpu_bound in mine:
            fill = "white" if cpu_bound else colour
            panel.plot(rate, ratio, "o", color=colour, mfc=fill, markersize=4)
    panel.set_xscale("log")
    rates = sorted({row.rate_mbit for row in rows})
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    panel.minorticks_off()
    panel.set_xlabel("link, Mbit/s")


def _dashes(parsed: VariantName) -> Any:
    half = parsed.precision == "bf16"
    if parsed.family == "torchrec-towers":
        return (0, (1, 3)) if half else ":"
    if parsed.family == "coded":
        return (0, (3, 1, 1, 1))
    if parsed.prefetch:
        return (0, (6, 1, 1, 1, 1, 1)) if half else "-."
    return "--" if half else "-"


def _caption(settings: Settings) -> str:
    text = "hollow: CPU-bound on this machine"
    if settings.compute_ms:
        text += f"; every step holds {settings.compute_ms:g} ms of modelled compute"
    return text
