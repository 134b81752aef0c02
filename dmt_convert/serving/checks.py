"""Run every exported graph against the model that it came from, in a process of its own.

A process of its own, because runtimes do not give their memory back, and because what kills one
must not kill the export: `python -m dmt_convert.serving.checks`. It prints one JSON object per
check, or one with the parts of an error. The batches have every form of input, empty bags, first
and last rows, and ids outside their tables.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dmt_convert.adapter import load_adapter
from dmt_convert.arrays import AnyArray, Float32Array
from dmt_convert.bundle import open_bundle, open_bundle_model
from dmt_convert.child import python_command, python_environment
from dmt_convert.data import Bag, Batch, adapt_batches, open_inputs
from dmt_convert.documents import GraphCheck, to_json
from dmt_convert.errors import DataError, DmtError, ExportError, GraphsDifferError
from dmt_convert.model import Code, DmtModel
from dmt_convert.progress import Progress
from dmt_convert.serving.export_manifest import WHOLE, tower_name
from dmt_convert.serving.exported_model import ExportedModel
from dmt_convert.serving.graph_inputs import FeatureInput, GraphInputs
from dmt_convert.serving.rounding import edge_sizes, rounding_sizes, without_codes
from dmt_convert.spec import ModelSpec

RTOL: Final = 2e-5
"""Of the largest value that the model gives: runtimes add fp32 numbers in another order, and sums
over thousands of products then differ by a few 1e-6 of it. A swapped column differs by about 1.
Where sums cancel, more is allowed, as much as rounding explains; see `rounding`. Beside that,
elements near the edge of a level of their tower's code may arrive at either of two levels."""
MAX_RTOL: Final = 1e-3
"""Of the largest value: never more is allowed, so that a fault can be told from rounding."""
ATOL: Final = 1e-6
"""For outputs that are zero throughout."""
ROW_COUNTS: Final = (1, 2, 7, 130)
"""Batch sizes that are run; none is the one that a graph was traced with."""
MANY_ROWS: Final = 2048
"""Rows of jagged bags that are too many to be read as one rectangle."""
LONG_BAG: Final = 100
"""Ids of a bag that no rectangle is made for."""
DATA_ROWS: Final = 1024
"""Rows of the given data that are run."""


def generate_batch(
    spec: ModelSpec,
    inputs: GraphInputs,
    rows: int,
    *,
    seed: int,
    longest: int = 0,
    first_rows: int | None = None,
) -> Batch:
    """Make rows that fit the forms of the inputs.

    If the form allows it, bags hold 0 to 4 ids and the first bag is empty. The first and the last
    row of every table occur. Features that come once per request have the same bag in every row.

    Args:
        spec: The model.
        inputs: Forms of the inputs.
        rows: How many rows.
        seed: What to draw with.
        longest: Ids in the last bag of every jagged feature; 0 for as many as in others.
        first_rows: How many rows of a table are looked up, beside its last one; by default all.
            Every page that a lookup maps counts as resident.
    """
    rng = np.random.default_rng((seed, rows))
    bags = []
    for feature in inputs.features:
        once = feature.feature in inputs.per_request
        table_rows = spec.table_of(feature.feature).rows
        bag = _bag(rng, feature, 1 if once else rows, table_rows, longest, first_rows)
        bags.append(_repeat(bag, rows) if once else bag)
    dense = rng.standard_normal((1 if inputs.dense_per_request else rows, spec.num_dense))
    return Batch(
        dense=np.broadcast_to(dense, (rows, spec.num_dense)).astype(np.float32),
        feature_names=spec.feature_names,
        bags=tuple(bags),
    )


def _bag(
    rng: np.random.Generator,
    feature: FeatureInput,
    rows: int,
    table_rows: int,
    longest: int,
    first_rows: int | None,
) -> Bag:
    if feature.form == "single":
        lengths = np.ones(rows, dtype=np.int64)
    elif feature.form == "fixed":
        lengths = np.full(rows, rng.integers(1, 5))
    else:
        lengths = rng.integers(0, 5, size=rows)
        lengths[0] = 0 if rows > 1 else rng.integers(0, 3)
        if longest and feature.form == "jagged":
            lengths[-1] = longest
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    drawn = min(table_rows, first_rows or table_rows)
    values = rng.integers(0, drawn, size=int(offsets[-1]), dtype=np.int64)
    if len(values):
        values[0], values[-1] = 0, table_rows - 1
    weights = rng.standard_normal(len(values)).astype(np.float32) if feature.weighted else None
    return Bag(values=values, offsets=offsets, weights=weights)


def _repeat(bag: Bag, rows: int) -> Bag:
    length = len(bag.values)
    return Bag(
        values=np.tile(bag.values, rows),
        offsets=np.arange(rows + 1, dtype=np.int64) * length,
        weights=None if bag.weights is None else np.tile(bag.weights, rows),
    )


def bad_ids(spec: ModelSpec, inputs: GraphInputs, batch: Batch) -> Iterator[tuple[Batch, str]]:
    """Yield batches with one id outside its table, for some features, and what it is.

    The first and the last feature of every form: below the table, just behind it, far behind it.
    """
    tried: dict[tuple[str, bool], list[int]] = {}
    for i, feature in enumerate(inputs.features):
        tried.setdefault((feature.form, feature.weighted), []).append(i)
    for members in tried.values():
        for i in dict.fromkeys((members[0], members[-1])):
            rows = spec.table_of(inputs.features[i].feature).rows
            low = -2 if inputs.features[i].form == "padded" else -1
            for value in (low, rows, 2**40):
                name = inputs.features[i].feature
                yield _with_id(batch, i, value), f"id {value} of {name} ({rows} rows)"


def _with_id(batch: Batch, feature: int, value: int) -> Batch:
    bag = batch.bags[feature]
    if not len(bag.values):
        offsets = np.minimum(np.arange(len(bag.offsets), dtype=np.int64), 1)
        weights = None if bag.weights is None else np.ones(1, dtype=np.float32)
        changed = Bag(values=np.array([value]), offsets=offsets, weights=weights)
    else:
        values = bag.values.copy()
        values[0] = value
        changed = replace(bag, values=values)
    bags = list(batch.bags)
    bags[feature] = changed
    return replace(batch, bags=tuple(bags))


def clipped(spec: ModelSpec, batch: Batch) -> Batch:
    """Return the batch with every id moved into its table."""
    bags = [
        replace(bag, values=bag.values.clip(0, spec.table_of(name).rows - 1))
        for name, bag in zip(batch.feature_names, batch.bags, strict=True)
    ]
    return replace(batch, bags=tuple(bags))


def check_graphs(
    folder: Path,
    bundle: Path,
    data: Path | None,
    progress: Progress,
    model: Path | None = None,
) -> tuple[GraphCheck, ...]:
    """Run all graphs of an export.

    Args:
        folder: The export.
        bundle: The bundle that it was made of.
        data: Rows to run on, beside generated ones.
        progress: Told of checks done and in all.
        model: The user's file that defines the bundle's model, if there is one.

    Raises:
        GraphsDifferError: A graph does not answer like the model.
        ExportError: A graph cannot be loaded, or the process died.
        DataError: The data does not fit the model, or the form of the inputs.
    """
    arguments = ["" if path is None else str(path) for path in (folder, bundle, data, model)]
    command = python_command("-m", "dmt_convert.serving.checks", *arguments)
    checks: list[GraphCheck] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            command,
            env=python_environment(),
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            value = json.loads(line)
            if "error" in value:
                raise _error(value)
            checks.append(GraphCheck(**value["check"]))
            progress("running the graphs", len(checks), value["total"])
        process.wait()
        complaints.seek(0)
        complaint = complaints.read()
    if process.returncode != 0:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        raise ExportError(
            f"the process that runs the graphs ended with code {process.returncode} ({last})",
            hint="free some memory and try again. If it fails again, report it with the output of "
            "DMT_TRACEBACK=1",
        )
    failed = [check for check in checks if not check.passed]
    if failed or not checks:
        raise GraphsDifferError(
            f"{len(failed)} of {len(checks)} checks failed: the graphs differ from the model",
            expected="the model's own outputs, within rounding",
            hint="unless the model overflows on such inputs, this is a bug: please report it. No "
            "export was written",
            details=[check.line for check in failed],
        )
    return tuple(checks)


def _error(value: Mapping[str, Any]) -> DmtError:
    kind = DataError if value["error"] == "DataError" else ExportError
    return kind(
        value["found"], expected=value["expected"], hint=value["hint"], details=value["details"]
    )


Checks = Iterator[GraphCheck]


def run_checks(exported: ExportedModel, model: DmtModel, data: Path | None) -> Checks:
    """Run all graphs of an export against the model it came from.

    Raises:
        DataError: The data does not fit the model, or the form of the inputs.
    """
    yield from _run(exported, model, list(_cases(exported, model, data)))


def _run(exported: ExportedModel, model: DmtModel, cases: Sequence[_Case]) -> Checks:
    """Run all graphs on some rows."""
    once = set(exported.manifest.inputs.per_request)
    # one graph after the other, so that the weights of one at a time need to be on a GPU
    for t, tower in enumerate(model.spec.towers):
        for case in cases:
            if case.logits is not None:
                right = case.towers[t]
                first = right.first_row() if once & set(tower.features) else right
                run = partial(exported.tower, t, case.batch)
                yield _check(exported, tower_name(t), case.what, first, run)
            case.send(exported, t)
    yield from _run_cases(exported, "joined", cases, lambda case: case.join(exported))
    if WHOLE in exported.manifest.parts:
        yield from _run_cases(exported, WHOLE, cases, lambda case: exported.whole(case.batch))


@dataclass(kw_only=True)
class _Case:
    """Rows that every graph is run on."""

    batch: Batch
    """The rows."""
    what: str
    """What they are."""
    towers: Sequence[_Right] = ()
    """What is right for every tower."""
    logits: _Right | None = None
    """What is right for the logits; None if the rows must be refused."""
    sent: list[Sequence[AnyArray]] = field(default_factory=list)
    """What the towers gave that have run, per request."""
    refusal: DataError | None = None
    """Why one of them refused."""

    def send(self, exported: ExportedModel, tower: int) -> None:
        """Run a tower."""
        try:
            self.sent.append(exported.sent(tower, self.batch))
        except DataError as error:
            self.refusal = error

    def join(self, exported: ExportedModel) -> Float32Array:
        """Return logits from what the towers gave.

        Raises:
            DataError: One of the graphs refused.
        """
        if self.refusal is not None:
            raise self.refusal
        return exported.joined(self.batch, self.sent)


def _cases(exported: ExportedModel, model: DmtModel, data: Path | None) -> Iterator[_Case]:
    inputs = exported.manifest.inputs
    spec = model.spec.flat
    equal = partial(_equal, model)
    for rows in ROW_COUNTS:
        yield equal(generate_batch(spec, inputs, rows, seed=rows), f"{rows} generated rows")
    if any(feature.form == "jagged" for feature in inputs.features):
        few = 512  # of their rows
        batch = generate_batch(spec, inputs, MANY_ROWS, seed=1, first_rows=few)
        yield equal(batch, f"{MANY_ROWS} generated rows")
        batch = generate_batch(spec, inputs, 300, seed=2, longest=LONG_BAG, first_rows=few)
        yield equal(batch, f"300 rows, bags of {LONG_BAG} among them")
    batch = generate_batch(spec, inputs, 3, seed=0)
    for wrong, what in bad_ids(spec, inputs, batch):
        if exported.manifest.out_of_range == "clip":
            yield equal(wrong, f"{what}, clipped", truth=clipped(spec, wrong))
        else:
            yield _Case(batch=wrong, what=what)
    if data is not None:
        dataset = open_inputs(data, spec, exported.manifest.columns)
        batches = dataset.batches(DATA_ROWS, max_rows=DATA_ROWS)
        for batch in adapt_batches(dataset, spec, batches):
            yield equal(batch, f"rows of {data.name}")


def _equal(model: DmtModel, batch: Batch, what: str, truth: Batch | None = None) -> _Case:
    """Return rows that graphs must answer as the model answers the truth, by default these rows."""
    towers, logits = _expected(model, batch if truth is None else truth)
    return _Case(batch=batch, what=what, towers=towers, logits=logits)


def _run_cases(
    exported: ExportedModel,
    part: str,
    cases: Sequence[_Case],
    run: Callable[[_Case], Float32Array],
) -> Checks:
    """Run all cases through graphs that give logits."""
    for case in cases:
        if case.logits is None:
            yield _refuse(exported, part, case, partial(run, case))
        else:
            yield _check(exported, part, case.what, case.logits, partial(run, case))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Right:
    """Right values of a graph's output."""

    low: Float32Array
    """The lowest ones."""
    high: Float32Array
    """The highest ones: others than the lowest if an element may arrive at either of two levels."""
    limit: float
    """How far rounding may lead beyond both."""

    def first_row(self) -> _Right:
        """Return what is right for the first row."""
        return replace(self, low=self.low[:1], high=self.high[:1])


def _expected(model: DmtModel, batch: Batch) -> tuple[list[_Right], _Right]:
    """Return what is right for every tower, and for the logits."""
    with without_codes(model):
        stages = dict(model.stages(batch))
        sizes = rounding_sizes(model, batch)
    towers, ranges, arrived = [], [], []
    for t, tower in enumerate(model.tower_list):
        stage = f"output of tower {t}"
        emitted, limit = stages[stage], _limit(stages[stage], sizes[stage])
        code = getattr(tower.tower_module, "code", None)
        low = high = middle = emitted
        if isinstance(code, Code):
            low, high = code.round(emitted - limit), code.round(emitted + limit)
            middle = code.round(emitted)
        ranges.append((low, high))
        arrived.append(middle)
        towers.append(_Right(low=low.numpy(), high=high.numpy(), limit=limit))
    dense = torch.from_numpy(np.array(batch.dense))
    logits = model.forward_emitted(dense, torch.cat(arrived, dim=1))
    edges = edge_sizes(model, dense, ranges)
    right = _Right(
        low=(logits - edges).numpy(),
        high=(logits + edges).numpy(),
        limit=_limit(logits, sizes["logit"]),
    )
    return towers, right


def _limit(values: Tensor, rounding: float) -> float:
    largest = float(values.abs().max()) if values.numel() else 0.0
    return ATOL + min(max(RTOL * largest, rounding), MAX_RTOL * largest)


def _check(
    exported: ExportedModel,
    part: str,
    what: str,
    right: _Right,
    run: Callable[[], Float32Array],
) -> GraphCheck:
    found = run()
    if found.shape != right.low.shape:
        return GraphCheck(
            part=part,
            what=what,
            rows=len(right.low),
            max_abs_diff=None,
            limit=None,
            passed=False,
            found=f"shape {found.shape} instead of {right.low.shape}",
            ran_on=exported.runs_on,
        )
    with np.errstate(invalid="ignore"):
        beyond = np.maximum(right.low - found, found - right.high)
        diff = float(beyond.max(initial=0.0))
    return GraphCheck(
        part=part,
        what=what,
        rows=len(right.low),
        max_abs_diff=diff,
        limit=right.limit,
        passed=bool(np.isfinite(diff)) and diff <= right.limit,
        ran_on=exported.runs_on,
    )


def _refuse(
    exported: ExportedModel, part: str, case: _Case, run: Callable[[], Float32Array]
) -> GraphCheck:
    try:
        run()
    except DataError:
        passed, found = True, ""
    else:
        passed, found = False, "was answered"
    return GraphCheck(
        part=part,
        what=f"refuses {case.what}",
        rows=case.batch.num_rows,
        max_abs_diff=None,
        limit=None,
        passed=passed,
        found=found,
        ran_on=exported.runs_on,
    )


def main(folder: str, bundle: str, data: str = "", adapter: str = "") -> int:
    """Print the checks of an export."""
    try:
        if adapter:
            load_adapter(Path(adapter))
        # what this process's parent has just written
        exported = ExportedModel(Path(folder), trust_code=True, checked=False)
        with torch.inference_mode():
            quantize = exported.manifest.quantize
            code = None if quantize == "none" else quantize
            model = open_bundle_model(open_bundle(Path(bundle)), code=code)
            checks = run_checks(exported, model, Path(data) if data else None)
            total = 0  # known to nobody before the end: progress shows a count
            for done in itertools.count(1):
                check = next(checks, None)
                if check is None:
                    return 0 if done > 1 else 1
                sys.stdout.write(json.dumps({"check": to_json(check), "total": total}) + "\n")
                sys.stdout.flush()
    except DmtError as error:
        sys.stdout.write(json.dumps(error.to_json()) + "\n")
        return 0
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
