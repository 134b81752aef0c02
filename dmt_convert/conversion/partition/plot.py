"""A partition as a picture: affinity before and after, the points, load per tower.

Letters: F features, T towers.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmt_convert.conversion.partition.partitioner import AnyFloats, Partition
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
}
_SUFFIXES: Final = (".png", ".svg")
_MAX_NAMED_FEATURES: Final = 64
_MAX_NUMBERED_TOWERS: Final = 32
_MAX_MATRIX_PIXELS: Final = 800


def plot_partition(spec: ModelSpec, partition: Partition, path: Path) -> None:
    """Draw a partition into a .svg or .png file; the same partition gives the same bytes.

    Without an affinity the panels that show it are left out.

    Raises:
        PartitionError: The suffix is neither .svg nor .png.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise PartitionError(
            f"a plot named {path.name}",
            expected=f"a name that ends in {' or '.join(_SUFFIXES)}",
            hint="rename the plot file",
        )
    path.write_bytes(_render(spec, partition, path.suffix.lower().removeprefix(".")))


@lru_cache(maxsize=1)  # a bundle holds the figure twice: as a file and in its report
def figure_svg(spec: ModelSpec, partition: Partition) -> str:
    """Draw a partition as an `<svg>` element, to be embedded in HTML."""
    text = _render(spec, partition, "svg").decode("utf-8")
    return text[text.index("<svg") :]


def _render(spec: ModelSpec, partition: Partition, kind: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # names may use any script; what the font lacks is shown as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = _draw(spec, partition)
        FigureCanvasAgg(figure)
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def _draw(spec: ModelSpec, partition: Partition) -> Figure:
    from matplotlib.figure import Figure

    panels = 2 * (partition.affinity is not None) + (partition.points is not None)
    height = 8.2 if panels else 3.6
    figure = Figure(figsize=(13.5 if panels else 9.5, height), layout="constrained")
    outer = figure.add_gridspec(2 if panels else 1, 1, height_ratios=[2.1, 1] if panels else [1])
    if panels:
        top = outer[0].subgridspec(1, panels)
        column = 0
        if partition.affinity is not None:
            _draw_matrices(figure, top, spec, partition)
            column = 2
        if partition.points is not None:
            _draw_points(figure.add_subplot(top[0, column]), spec, partition)
    bottom = outer[-1].subgridspec(1, 4)
    _draw_loads([figure.add_subplot(bottom[0, k]) for k in range(4)], partition)
    figure.suptitle(_title(spec, partition), fontsize=10.5, x=0.01, ha="left")
    return figure


def _title(spec: ModelSpec, partition: Partition) -> str:
    features, towers = len(spec.features), len(partition.assignment.towers)
    title = f"{features} feature{'s' * (features > 1)} in {towers} tower{'s' * (towers > 1)}"
    title += f", {partition.strategy}"
    if partition.within_affinity is not None and partition.between_affinity is not None:
        title += (
            f"; mean {partition.affinity_kind} affinity {partition.within_affinity:.3f} inside "
            f"towers, {partition.between_affinity:.3f} between"
        )
    return title


def _colours(towers: int) -> list[Any]:
    import matplotlib

    if towers <= 10:
        return [matplotlib.colormaps["tab10"](t) for t in range(towers)]
    # Hues in steps of the golden ratio: neighbours in number never look alike.
    hues = (0.58 + 0.61803398875 * np.arange(towers)) % 1
    values = np.where(np.arange(towers) % 2, 0.62, 0.85)
    from matplotlib.colors import hsv_to_rgb

    return [tuple(hsv_to_rgb((h, 0.72, v))) for h, v in zip(hues, values, strict=True)]


def _draw_matrices(figure: Figure, grid: Any, spec: ModelSpec, partition: Partition) -> None:
    from matplotlib.patches import Rectangle

    assert partition.affinity is not None
    index = {name: i for i, name in enumerate(spec.feature_names)}
    by_tower = [index[name] for tower in partition.assignment.towers for name in tower]
    count = len(index)
    away = partition.affinity[~np.eye(count, dtype=bool)]
    # A few extreme pairs must not leave the rest in the dark.
    top = float(np.quantile(away, 0.995)) if len(away) else 1.0
    low = float(np.quantile(away, 0.005)) if len(away) else 0.0
    orders = (("Affinity, model order", list(range(count))), ("Affinity, by tower", by_tower))
    axes = [figure.add_subplot(grid[0, k]) for k in range(2)]
    for ax, (title, order) in zip(axes, orders, strict=True):
        matrix = _shrink(partition.affinity, order)
        image = ax.imshow(
            matrix,
            cmap="magma",
            vmin=low,
            vmax=max(top, low + 1e-6),
            extent=(-0.5, count - 0.5, count - 0.5, -0.5),
            interpolation="nearest",
        )
        ax.set_title(title)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        _name_axes(ax, [spec.feature_names[i] for i in order])
    begin = 0
    for tower in partition.assignment.towers:
        corner, size = (begin - 0.5, begin - 0.5), len(tower)
        width = 1.4 if count <= 200 else 0.7
        axes[1].add_patch(Rectangle(corner, size, size, fill=False, ec="#5ee0c0", lw=width))
        begin += size
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=40, shrink=0.8)
    bar.outline.set_visible(False)


def _name_axes(ax: Axes, names: Sequence[str]) -> None:
    if len(names) > _MAX_NAMED_FEATURES:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(f"{len(names)} features")
        return
    size = 6.5 if len(names) <= 32 else 4.5
    short = [_label(name, 12) for name in names]
    ax.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
    ax.set_yticks(range(len(names)), short, fontsize=size)


def _label(name: str, limit: int) -> str:
    """Shorten a name out of a checkpoint and make it harmless: `$` would start a formula."""
    short = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return "".join(char if char.isprintable() else "\ufffd" for char in short).replace("$", r"\$")


def _shrink(affinity: AnyFloats, order: Sequence[int]) -> AnyFloats:
    """Reorder, leave the diagonal out (NaN), and average blocks where no pixel would show them."""
    matrix = affinity[np.ix_(order, order)].astype(np.float64)
    np.fill_diagonal(matrix, np.nan)
    if len(matrix) <= _MAX_MATRIX_PIXELS:
        return matrix
    np.fill_diagonal(matrix, 0)
    edges = np.linspace(0, len(matrix), _MAX_MATRIX_PIXELS + 1).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1)
    sizes = np.diff([*edges, len(matrix)])
    pairs = np.outer(sizes, sizes).astype(np.float64)
    pairs[np.diag_indices(len(sizes))] -= sizes
    return np.asarray(np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0))


def _draw_points(ax: Axes, spec: ModelSpec, partition: Partition) -> None:
    assert partition.points is not None
    towers = partition.assignment.towers
    colours = _colours(len(towers))
    tower_of = partition.assignment.tower_of
    mine = np.array([tower_of[name] for name in spec.feature_names])
    named = len(mine) <= _MAX_NAMED_FEATURES
    size = 70 if named else max(4.0, 20000 / len(mine) / 2)
    for t in range(len(towers)):
        x, y = partition.points[mine == t].T
        dots = ax.scatter(x, y, s=size, color=colours[t], linewidths=0.4, edgecolors="white")
        # Thousands of circles would weigh more than everything else in the file.
        dots.set_rasterized(not named)
    if named:
        for (x, y), name, t in zip(partition.points, spec.feature_names, mine, strict=True):
            ax.annotate(str(t), (x, y), ha="center", va="center", fontsize=5.5, color="white")
            ax.annotate(
                _label(name, 10),
                (x, y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=5.5,
                color=colours[t],
            )
    ax.set_title("Features in the plane, coloured by tower")
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_box_aspect(1)
    ax.tick_params(labelsize=6)
    ax.margins(0.08)


def _draw_loads(axes: Sequence[Axes], partition: Partition) -> None:
    from matplotlib.ticker import MaxNLocator

    loads = partition.loads
    colours = _colours(len(loads))
    table_bytes = [float(load.table_bytes) for load in loads]
    factor, unit = _byte_unit(max(table_bytes))
    panels = (
        ("Features", [float(load.features) for load in loads]),
        (f"Tables ({unit})", [value / factor for value in table_bytes]),
        ("Lookups per sample", [load.lookups for load in loads]),
        ("Emitted bytes per sample", [float(load.emitted_bytes) for load in loads]),
    )
    for ax, (title, values) in zip(axes, panels, strict=True):
        ax.bar(range(len(values)), values, color=colours, width=0.8)
        ax.axhline(float(np.mean(values)), color="#444444", lw=0.8, ls="--")
        ax.set_title(title)
        ax.set_xlabel("tower (dashed: mean)")
        ax.tick_params(labelsize=6.5)
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
