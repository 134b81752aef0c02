"""Tables and a picture of what `benchmarks/frontier.py` measured.

    python benchmarks/frontier_tables.py RESULTS --labels today frontier --picture frontier.svg

A cell of a table is a mean over the seeds: AUC lost, in brackets the largest minus the smallest if
there are several seeds, R^2 of the logits, and the bytes achieved where they differ from what was
asked for by more than 2 %. After an arrow: AUC lost after fine-tuning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from quality_tables import Record, group, print_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODEL: Final = ("data", "arch", "dim")
_LINE: Final = ("label", "variant", "sample", "towers")
_FLOOR: Final = 1e-5
"""AUC lost is drawn no smaller than this; gains are drawn here too."""
_STYLE: Final[dict[str, Any]] = {
    "svg.hashsalt": "dmt-convert",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def read_results(folder: Path, labels: Sequence[str] | None) -> list[Record]:
    """Read the files of some labels, or of all."""
    paths = sorted(folder.glob("*.jsonl"))
    return [
        json.loads(line) | {"label": path.stem}
        for path in paths
        if not labels or path.stem in labels
        for line in path.read_text().splitlines()
    ]


def print_tables(records: Sequence[Record]) -> None:
    """One table per data set, architecture and N: a row per way to convert, bytes as columns."""
    for model, members in group(records, _MODEL).items():
        flat = [r for r in members if r["variant"].startswith("flat")]
        made = [r for r in members if "towers" in r and "refused" not in r]
        base = [r["auc"] for r in unique(flat) if r["variant"] == "flat fp32"]
        columns = sorted({r["compression"] or 0 for r in made})
        print(f"\n### {model[0]}, {model[1]}, N = {model[2]}: flat AUC {np.mean(base):.4f}\n")
        titles = [
            "options",
            "sample",
            "towers",
            *("default" if c == 0 else f"/ {c:g}" for c in columns),
        ]
        rows = [
            [f"{line[0]}: {line[1]}", line[2], str(line[3])]
            + [show_cell([r for r in found if (r["compression"] or 0) == c]) for c in columns]
            for line, found in group(made, _LINE).items()
        ]
        for (variant,), found in group(unique(flat), ["variant"]).items():
            rows.append(
                [variant, "-", "-", show_cell(found, of_flat=True)] + [""] * (len(columns) - 1)
            )
        print_rows(titles, rows)


def unique(records: Iterable[Record]) -> list[Record]:
    """The flat model's records, which every label repeats."""
    return list(
        {(r["data"], r["arch"], r["dim"], r["seed"], r["variant"]): r for r in records}.values()
    )


def show_cell(records: Sequence[Record], *, of_flat: bool = False) -> str:
    if not records:
        return ""
    lost = [r["auc_lost"] for r in records]
    text = f"{np.mean(lost):.4f}".replace("-0.0000", "0.0000")
    if len(lost) > 1:
        text += f" ({np.ptp(lost):.4f})"
    text += f", {np.mean([r['r2'] for r in records]):.4f}"
    achieved = float(np.mean([r["achieved"] for r in records]))
    asked = None if of_flat else records[0]["compression"]
    if asked is None or abs(achieved / asked - 1) > 0.02:
        text += f" at / {achieved:.3g}"
    tuned = [r["tuned_auc_lost"] for r in records if "tuned_auc_lost" in r]
    return text + (f" -> {np.mean(tuned):.4f}" if tuned else "")


def print_summary(records: Sequence[Record]) -> None:
    """One table of the conversions without further options: a row per model, bytes as columns."""
    made = [r for r in records if r["variant"] == "default" and "refused" not in r]
    columns = sorted({r["compression"] or 0 for r in made})
    titles = ["set", "model, N", "towers", "sample"]
    titles += ["no option" if c == 0 else f"/ {c:g}" for c in columns]
    rows = []
    for line, found in group(made, ("sample", "arch", "dim", "towers", "data")).items():
        cells = [
            show_worst([r for r in found if (r["compression"] or 0) == column])
            for column in columns
        ]
        sample, arch, dim, towers, data = line
        rows.append([data, f"{arch}, {dim}", str(towers), sample, *cells])
    order = {name: i for i, name in enumerate(("calibrated", "no data", "dlrm, 16", "dcn, 16"))}
    rows.sort(key=lambda row: (order[row[3]], order.get(row[1], 9), row[2]))
    print_rows(titles, rows)


def show_worst(records: Sequence[Record]) -> str:
    """AUC lost and R^2; of several seeds the mean, the most that was lost, and the lowest R^2."""
    if not records:
        return ""
    lost = [r["auc_lost"] for r in records]
    text = f"{np.mean(lost):.4f}"
    if len(lost) > 1:
        text += f" (at most {max(lost):.4f} of {len(lost)})"
    return f"{text}, {min(r['r2'] for r in records):.4f}".replace("-0.0000", "0.0000")


def draw(records: Sequence[Record], path: Path) -> None:
    """AUC lost against bytes, a panel per data set, architecture and N."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = group(records, _MODEL)
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(3.3 * columns + 2, 2.6 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        labels: dict[str, Any] = {}
        for panel, (model, members) in zip(panels.flat, models.items(), strict=False):
            panel.set_title(f"{model[0]}, {model[1]}, N = {model[2]}")
            _draw_panel(panel, members, labels)
        for panel in panels.flat[len(models) :]:
            panel.set_visible(False)
        figure.supylabel("test AUC lost")
        figure.supxlabel("fewer bytes between hosts than flat in fp32")
        figure.legend(list(labels.values()), list(labels), loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(panel: Axes, records: Sequence[Record], labels: dict[str, Any]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(_FLOOR / 1.5, 0.1)
    for bound in (1e-4, 1e-3):
        panel.axhline(bound, color="#dddddd", linewidth=0.8)
    made = [r for r in records if "towers" in r and "refused" not in r]
    for line, members in group(made, _LINE).items():
        points = sorted(
            (np.mean([r["achieved"] for r in found]), np.mean([r["auc_lost"] for r in found]))
            for found in group(members, ["compression"]).values()
        )
        name = f"{line[0]}: {line[1]}, {line[2]}, {line[3]} towers"
        colour = f"C{list(labels).index(name) if name in labels else len(labels)}"
        xs, ys = zip(*points, strict=True)
        drawn = panel.plot(xs, np.maximum(ys, _FLOOR), "o-", markersize=3, color=colour)
        labels.setdefault(name, drawn[0])
    flat = unique(r for r in records if r["variant"].startswith("flat"))
    xs, ys = [r["achieved"] for r in flat], [max(r["auc_lost"], _FLOOR) for r in flat]
    marks = panel.scatter(xs, ys, marker="x", color="black", zorder=3)
    labels.setdefault("flat: fp32, bf16, int8", marks)
    panel.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of the JSON lines")
    parser.add_argument("--labels", nargs="+", help="names of the files in it; by default all")
    parser.add_argument("--summary", action="store_true", help="one table, without further options")
    parser.add_argument("--picture", type=Path, help=".svg or .png to write")
    options = parser.parse_args()
    records = read_results(options.results, options.labels)
    if options.summary:
        print_summary(records)
    else:
        print_tables(records)
    if options.picture is not None:
        draw(records, options.picture)


if __name__ == "__main__":
    main()
