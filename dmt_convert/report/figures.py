"""The figure of a partition: affinity before and after, and the load of every tower.

matplotlib is imported when something is drawn.

Letters: F features, T towers.
"""

from __future__ import annotations

import colorsys
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmt_convert.arrays import Float64Array, FloatArray
from dmt_convert.documents import PartitionRecord, TowerLoadRecord
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Towers = tuple[tuple[str, ...], ...]
"""Feature names of every tower."""

_STYLE: Final[dict[str, Any]] = {
    "svg.hashsalt": "dmt-convert",
    "svg.fonttype": "none",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
}
_TEN: Final = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
_SUFFIXES: Final = (".png", ".svg")
_WIDTH: Final = 9.5
_MAX_NAMED_FEATURES: Final = 64
_MAX_NUMBERED_TOWERS: Final = 32
_MAX_MATRIX_PIXELS: Final = 800
_ELEMENT_BYTES: Final = 4
"""Pooled embeddings are float32."""


def plot_partition(
    path: Path,
    spec: ModelSpec,
    towers: Towers,
    record: PartitionRecord,
    affinity: FloatArray | None = None,
) -> None:
    """Draw a partition into a .svg or .png file; the same partition gives the same bytes.

    Args:
        path: The file.
        spec: The flat model.
        towers: Features of every tower.
        record: How the towers were chosen, and what they cost.
        affinity: Affinity of features in model order, shape (F, F); without it only the loads are
            drawn.

    Raises:
        PartitionError: The suffix is neither .svg nor .png.
    """
    path.write_bytes(_render(figure_kind(path), spec, towers, record, affinity))


def figure_kind(path: Path) -> str:
    """Return png or svg.

    Raises:
        PartitionError: The suffix is another one.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise PartitionError(
            f"a plot named {path.name}",
            expected=f"a name that ends in {' or '.join(_SUFFIXES)}",
            hint="rename the plot file",
        )
    return path.suffix.lower().removeprefix(".")


def figure_svg(
    spec: ModelSpec, towers: Towers, record: PartitionRecord, affinity: FloatArray | None = None
) -> str:
    """Draw a partition as an `<svg>` element, to be embedded in HTML; see `plot_partition`."""
    text = _render("svg", spec, towers, record, affinity).decode("utf-8")
    return text[text.index("<svg") :]


def tower_loads(
    spec: ModelSpec, towers: Towers, record: PartitionRecord
) -> tuple[TowerLoadRecord, ...]:
    """Return what every tower costs: as recorded, or else computed with one id per feature."""
    if len(record.loads) == len(towers) and all(load.lookups is not None for load in record.loads):
        return record.loads
    return tuple(
        TowerLoadRecord(
            features=len(names),
            table_bytes=sum(
                {spec.table_of(n).name: spec.table_of(n).nbytes for n in names}.values()
            ),
            lookups=float(len(names)),
        )
        for names in towers
    )


def tower_colours(count: int) -> tuple[str, ...]:
    """The colours of the towers, as #rrggbb."""
    if count <= len(_TEN):
        return _TEN[:count]
    return tuple(_spread_hue(tower) for tower in range(count))


def _spread_hue(tower: int) -> str:
    # Hues in steps of the golden ratio: towers with adjacent numbers never look alike.
    hue = (0.58 + 0.61803398875 * tower) % 1
    channels = colorsys.hsv_to_rgb(hue, 0.72, 0.62 if tower % 2 else 0.85)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _render(
    kind: str,
    spec: ModelSpec,
    towers: Towers,
    record: PartitionRecord,
    affinity: FloatArray | None,
) -> bytes:
    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(1 + shown, 1, height_ratios=[2.1, 1] if shown else [1])
        if affinity is not None:
            _draw_matrices(figure, grid[0], spec, towers, affinity)
        bottom = grid[-1].subgridspec(1, 4)
        axes = [figure.add_subplot(bottom[0, k]) for k in range(4)]
        _draw_loads(axes, spec, towers, tower_loads(spec, towers, record))
        figure.suptitle(_title(spec, towers, record), fontsize=10.5, x=0.01, ha="left")

    shown = affinity is not None
    return render_figure(kind, 8.2 if shown else 3.6, draw)


def render_figure(kind: str, height: float, draw: Callable[[Figure], None]) -> bytes:
    """Return a figure as a file's content; the same drawing gives the same bytes.

    Args:
        kind: png or svg.
        height: Its height in inches, at the width of the page.
        draw: Draws it.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Names may use any script; a glyph that the font lacks is shown as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure)
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def _title(spec: ModelSpec, towers: Towers, record: PartitionRecord) -> str:
    features = len(spec.features)
    title = f"{features} feature{'s' * (features > 1)} in {len(towers)} "
    title += f"tower{'s' * (len(towers) > 1)}, {record.strategy}"
    if record.within_affinity is not None and record.between_affinity is not None:
        title += (
            f"; mean {record.affinity} affinity {record.within_affinity:.3f} inside "
            f"towers, {record.between_affinity:.3f} between"
        )
    return title


def _draw_matrices(
    figure: Figure, cell: Any, spec: ModelSpec, towers: Towers, affinity: FloatArray
) -> None:
    from matplotlib.patches import Rectangle

    names = spec.feature_names
    count = len(names)
    ordered = _order_towers(affinity, spec, towers)
    away = affinity[~np.eye(count, dtype=bool)]
    # The colours end at quantiles: a few extreme pairs would leave all others dark.
    low, top = np.quantile(away, (0.005, 0.995)) if len(away) else (0.0, 1.0)
    orders = {"Affinity, by tower": np.concatenate(ordered)}
    if (orders["Affinity, by tower"] != np.arange(count)).any():
        orders = {"Affinity, model order": np.arange(count), **orders}
    grid = cell.subgridspec(1, len(orders))
    axes = [figure.add_subplot(grid[0, k]) for k in range(len(orders))]
    for ax, (title, order) in zip(axes, orders.items(), strict=True):
        image = ax.imshow(
            _shrink(affinity[np.ix_(order, order)]),
            cmap="magma",
            vmin=low,
            vmax=max(top, low + 1e-6),
            extent=(-0.5, count - 0.5, count - 0.5, -0.5),
            interpolation="nearest",
        )
        ax.set_title(title)
        ax.spines[:].set_visible(False)
        _name_axes(ax, [names[i] for i in order])
    begin = 0
    for tower in ordered:
        corner, size = (begin - 0.5, begin - 0.5), len(tower)
        width = 1.4 if count <= 200 else 0.7
        axes[-1].add_patch(Rectangle(corner, size, size, fill=False, ec="#5ee0c0", lw=width))
        begin += size
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=40, shrink=0.8)
    bar.outline.set_visible(False)


def _order_towers(
    affinity: FloatArray, spec: ModelSpec, towers: Towers
) -> list[np.ndarray[Any, Any]]:
    """Feature indices of every tower, those with the highest affinity to their tower first."""
    index = {name: i for i, name in enumerate(spec.feature_names)}
    ordered = []
    for names in towers:
        tower = np.array([index[name] for name in names])
        strength = affinity[np.ix_(tower, tower)].sum(axis=1)
        ordered.append(tower[np.argsort(-strength, kind="stable")])
    return ordered


def _name_axes(ax: Axes, names: Sequence[str]) -> None:
    ax.tick_params(length=0)
    if len(names) > _MAX_NAMED_FEATURES:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(f"{len(names)} features")
        return
    size = 6.5 if len(names) <= 32 else 4.5
    short = [_label(name) for name in names]
    ax.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
    ax.set_yticks(range(len(names)), short, fontsize=size)


def _label(name: str, limit: int = 12) -> str:
    """Shorten a name from a checkpoint and make it harmless: `$` would start a formula."""
    short = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return "".join(char if char.isprintable() else "\ufffd" for char in short).replace("$", r"\$")


def _shrink(affinity: FloatArray) -> Float64Array:
    """Leave the diagonal out (NaN), and average blocks if there are more features than pixels."""
    matrix = affinity.astype(np.float64)
    if len(matrix) <= _MAX_MATRIX_PIXELS:
        np.fill_diagonal(matrix, np.nan)
        return matrix
    np.fill_diagonal(matrix, 0)
    edges = np.linspace(0, len(matrix), _MAX_MATRIX_PIXELS + 1).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1)
    sizes = np.diff([*edges, len(matrix)])
    pairs = np.outer(sizes, sizes).astype(np.float64)
    pairs[np.diag_indices(len(sizes))] -= sizes
    return np.asarray(np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0))


def _draw_loads(
    axes: Sequence[Axes], spec: ModelSpec, towers: Towers, loads: Sequence[TowerLoadRecord]
) -> None:
    from matplotlib.ticker import MaxNLocator

    table_bytes = [float(load.table_bytes) for load in loads]
    factor, unit = _byte_unit(max(table_bytes))
    panels = {
        "Features": [float(load.features) for load in loads],
        f"Tables ({unit})": [value / factor for value in table_bytes],
        "Lookups per sample": [load.lookups or 0.0 for load in loads],
        "Emitted bytes per sample": [
            float(_ELEMENT_BYTES * sum(spec.table_of(name).dim for name in tower))
            for tower in towers
        ],
    }
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.bar(range(len(values)), values, color=tower_colours(len(loads)), width=0.8)
        ax.axhline(float(np.mean(values)), color="#444444", lw=0.8, ls="--")
        ax.set_title(title)
        ax.set_xlabel("tower (dashed: mean)")
        if all(value == int(value) for value in values):
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(0, max(values) * 1.08 or 1)
        if len(values) <= _MAX_NUMBERED_TOWERS:
            ax.set_xticks(range(len(values)))
        ax.set_xlim(-0.6, len(values) - 0.4)


def _byte_unit(value: float) -> tuple[float, str]:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return float(1024**power), unit
    return 1.0, "bytes"
