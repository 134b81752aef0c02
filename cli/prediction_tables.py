"""How `dmt plan` shows a prediction: as JSON, and as what people read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import grid, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmt_convert.model import DmtSpec
    from dmt_convert.placement import TowerPlan
    from dmt_convert.placement.predict import (
        Machine,
        PlacedStep,
        Prediction,
        ScalePoint,
        Suggestion,
    )

_NAMES = {"flat": "flat", "sptt": "SPTT", "dmt": "DMT (this bundle)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A prediction, ready to print."""

    value: dict[str, Any]
    """What stands under `prediction` in JSON."""
    tables: list[RenderableType]
    """What people read."""


def show_prediction(
    model: DmtSpec,
    plan: TowerPlan,
    machine: Machine,
    *,
    ids_per_bag: float,
    predict: bool,
    scaling: bool,
    plot: Path | None,
) -> Shown:
    """Predict what was asked for, draw it where that was asked for, and say it."""
    from dmt_convert.placement.predict import (
        describe_machine,
        predict_placement,
        predict_plan,
        predict_scaling,
        suggest,
    )

    value = describe_machine(machine, ids_per_bag)
    tables = [grid(_facts(machine, ids_per_bag))]
    if predict:
        prediction = predict_plan(model, plan, machine, ids_per_bag=ids_per_bag)
        placed = predict_placement(model, plan, machine, ids_per_bag=ids_per_bag)
        suggestion = suggest(model.flat, machine, ids_per_bag=ids_per_bag)
        value["rows"] = [step.to_json() for step in prediction.steps]
        value["as_placed"] = {
            "step_ms": placed.step.total * 1e3,
            "busiest_rank": placed.busiest_rank,
        }
        value |= suggestion.to_json()
        tables += [_steps(prediction), _placement(placed), *_suggestion(suggestion)]
    if scaling:
        compression = model.compression
        points = predict_scaling(
            model.flat, machine, compression=compression, ids_per_bag=ids_per_bag
        )
        value["scaling"] = [point.to_json() for point in points]
        tables.append(_scaling(points))
        if plot is not None:
            _plot(points, machine, plot)
            value["files"] = [str(plot)]
    return Shown(value=value, tables=tables)


def _facts(machine: Machine, ids_per_bag: float) -> list[tuple[str, str]]:
    cluster = machine.network.cluster
    return [
        ("\nprediction", "\nmodelled, not measured; see docs/prediction.md"),
        (
            "for",
            f"{machine.gpu.name.upper()}, {cluster.intra_gbps:g} Gbit/s per rank inside the host, "
            f"{cluster.inter_gbps:g} to other hosts",
        ),
        (
            "step",
            f"{machine.batch} samples per rank, {ids_per_bag:g} id(s) per feature, embeddings "
            f"travel as {machine.comm_dtype}",
        ),
    ]


def _steps(prediction: Prediction) -> RenderableType:
    columns = [
        "variant", "step ms>", "exposed communication>", "of communication>", "lookup>",
        "compute>", "overhead>", "speed-up>",
    ]  # fmt: skip
    rows = []
    for predicted in prediction.steps:
        step = predicted.step
        times = (
            step.total,
            step.exposed,
            step.communication,
            step.lookup,
            step.compute,
            step.overhead,
        )
        rows.append(
            [
                _NAMES[predicted.variant],
                *(f"{seconds * 1e3:.3f}" for seconds in times),
                f"{predicted.speedup:.2f}",
            ]
        )
    return table("\nModelled step times in ms", columns, rows)


def _placement(placed: PlacedStep) -> RenderableType:
    text = (
        f"tables are taken as spread evenly inside their hosts; as this plan places them, the "
        f"busiest rank looks up {placed.busiest_rank:.1f} times the mean, and a DMT step takes "
        f"{placed.step.total * 1e3:.3f} ms"
    )
    return grid([("note", text)])


def _suggestion(suggestion: Suggestion) -> list[RenderableType]:
    columns = ["towers>", "compression>", "step ms>", "speed-up>"]
    rows = [
        [str(c.towers), f"{c.compression:.3g}", f"{c.seconds * 1e3:.3f}", f"{c.speedup:.2f}"]
        for c in suggestion.candidates[:5]
    ]
    best = suggestion.best
    text = (
        f"{best.towers} towers at compression {best.compression:.3g}: {best.speedup:.2f} times as "
        "fast as flat by the model; what it costs in quality `dmt convert` measures"
        if suggestion.worth_it
        else "stay flat: no choice of towers and compression is faster here by the model"
    )
    facts = [("suggestion", text)]
    if suggestion.refused:
        counts = ", ".join(map(str, suggestion.refused))
        facts.append(("no room", f"with {counts} towers tables do not fit the memory"))
    title = "\nModelled: the fastest choices"
    return [table(title, columns, rows), grid(facts)]


def _scaling(points: tuple[ScalePoint, ...]) -> RenderableType:
    columns = [
        "GPUs>", "hosts>", "towers>", "flat ms>", "SPTT ms>", "DMT ms>", "SPTT speed-up>",
        "DMT speed-up>",
    ]  # fmt: skip
    rows = []
    for point in points:
        steps = point.prediction.steps
        rows.append(
            [
                *(str(number) for number in (point.ranks, point.hosts, point.towers)),
                *(f"{predicted.step.total * 1e3:.3f}" for predicted in steps),
                *(f"{predicted.speedup:.2f}" for predicted in steps[1:]),
            ]
        )
    compression = max(point.compression for point in points)
    title = (
        f"\nModelled scaling at compression {compression:.3g}, tables spread evenly, never checked "
        "beyond 512 GPUs"
    )
    return table(title, columns, rows)


def _plot(points: tuple[ScalePoint, ...], machine: Machine, plot: Path) -> None:
    from dmt_convert.placement.predict import plot_scaling

    from .partition_command import staged_file

    cluster = machine.network.cluster
    title = (
        f"{machine.gpu.name.upper()}, {cluster.ranks_per_host} per host, {cluster.inter_gbps:g} "
        f"Gbit/s each, {machine.batch} samples per GPU, {machine.comm_dtype} communication"
    )
    with staged_file(plot) as staged:
        plot_scaling(points, title, staged)
