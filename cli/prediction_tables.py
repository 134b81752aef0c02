"""How `dmt plan` shows a prediction: as JSON, and as what people read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import grid, human_bytes, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmt_convert.placement.predict import (
        Machine,
        PlacedStep,
        PredictedStep,
        Prediction,
        PredictionReport,
        ScalePoint,
        StepTime,
        Suggestion,
    )

_PRECISIONS = {"highest": "float32", "high": "TF32", "medium": "bf16"}
_NAMES = {"flat": "flat", "flat2d": "flat, 2D", "sptt": "SPTT", "dmt": "DMT (this bundle)"}


def show_prediction(report: PredictionReport) -> list[RenderableType]:
    """Make the tables of a prediction."""
    tables = [grid(_facts(report.machine, report.ids_per_bag))]
    if report.prediction is not None:
        tables.append(_steps(report.prediction, report.placed))
        tables.append(_bytes(report.prediction))
    if report.placed is not None:
        tables.append(_placement(report.placed))
    if report.suggestion is not None:
        copies = None if report.prediction is None else report.prediction.flat_2d
        tables += _suggestion(report.suggestion, copies)
    if report.scaling is not None:
        tables.append(_scaling(report.scaling))
    return tables


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
            f"travel as {machine.embedding_dtype}, matrix products in "
            f"{_PRECISIONS[machine.gpu.matmul_precision]}",
        ),
    ]


def _steps(prediction: Prediction, placed: PlacedStep | None) -> RenderableType:
    columns = [
        "variant", "step ms>", "exposed communication>", "of communication>", "lookup>",
        "compute>", "overhead>", "speed-up>",
    ]  # fmt: skip
    rows = [_step(_NAMES[each.variant], each.step, each.speedup) for each in prediction.rows]
    if prediction.flat_2d is not None:
        rows[1][0] += f" ({prediction.flat_2d.copies} copies)"
    if placed is not None:
        rows.append(_step("DMT (this plan)", placed.step, placed.speedup))
    return table("\nModelled step times in ms", columns, rows)


def _step(name: str, step: StepTime, speedup: float) -> list[str]:
    times = (
        *(step.total, step.exposed, step.communication),
        *(step.lookup, step.compute, step.overhead),
    )
    return [name, *(f"{seconds * 1e3:.3f}" for seconds in times), f"{speedup:.2f}"]


def _bytes(prediction: Prediction) -> RenderableType:
    said = ", ".join(
        f"{_NAMES[each.variant]} {human_bytes(each.forward_bytes)} and "
        f"{human_bytes(each.gradient_bytes)}"
        for each in prediction.rows
    )
    return grid([("between hosts", f"per sample of the busiest rank, there and back: {said}")])


def _placement(placed: PlacedStep) -> RenderableType:
    text = (
        "flat, SPTT and this bundle are predicted with tables spread evenly inside their hosts; "
        f"as this plan places them, the busiest rank looks up {placed.busiest_rank:.1f} times the "
        "mean"
    )
    return grid([("note", text)])


def _suggestion(suggestion: Suggestion, copies: PredictedStep | None) -> list[RenderableType]:
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
    if copies is not None and copies.speedup > max(best.speedup, 1.0):
        rival = f"flat in {copies.copies} copies of its tables is faster still by the model: "
        facts.append(("but", f"{rival}{copies.speedup:.2f} times flat"))
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
