"""The process that runs an export's graphs: `python -m dmt_convert.serving.check_process`.

Prints one JSON object per check, or one with the parts of an error.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from dmt_convert.adapter import load_adapter
from dmt_convert.bundle import open_bundle, open_bundle_model
from dmt_convert.data import Batch, adapt_batches, open_data
from dmt_convert.errors import DataError, DmtError
from dmt_convert.model import DmtModel
from dmt_convert.serving.check_batches import bad_ids, clipped, generate_batch
from dmt_convert.serving.export_manifest import WHOLE, tower_name
from dmt_convert.serving.exported_model import ExportedModel
from dmt_convert.serving.graph_checks import GraphCheck

RTOL: Final = 2e-5
"""Of the largest value that the model gives: runtimes add fp32 numbers in another order, and sums
over thousands of products then differ by a few 1e-6 of it. A swapped column differs by about 1."""
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

FloatArray = npt.NDArray[np.float32]
Checks = Iterator[GraphCheck]


def run_checks(exported: ExportedModel, model: DmtModel, data: Path | None) -> Checks:
    """Run all graphs of an export against the model it came from.

    Raises:
        DataError: The data does not fit the model, or the form of the inputs.
    """
    inputs = exported.manifest.inputs
    spec = model.spec.flat
    for rows in ROW_COUNTS:
        batch = generate_batch(spec, inputs, rows, seed=rows)
        yield from _compare(exported, model, batch, f"{rows} generated rows")
    if any(feature.form == "jagged" for feature in inputs.features):
        few = 512  # of their rows
        batch = generate_batch(spec, inputs, MANY_ROWS, seed=1, first_rows=few)
        yield from _compare(exported, model, batch, f"{MANY_ROWS} generated rows")
        batch = generate_batch(spec, inputs, 300, seed=2, longest=LONG_BAG, first_rows=few)
        yield from _compare(exported, model, batch, f"300 rows, bags of {LONG_BAG} among them")
    batch = generate_batch(spec, inputs, 3, seed=0)
    for wrong, what in bad_ids(spec, inputs, batch):
        if exported.manifest.out_of_range == "clip":
            fixed = clipped(spec, wrong)
            yield from _compare(exported, model, wrong, f"{what}, clipped", truth=fixed)
        else:
            yield from _refuse(exported, wrong, what)
    if data is not None:
        dataset = open_data(data)
        batches = dataset.batches(DATA_ROWS, max_rows=DATA_ROWS)
        for batch in adapt_batches(dataset, spec, batches):
            yield from _compare(exported, model, batch, f"rows of {data.name}")


def _compare(
    exported: ExportedModel, model: DmtModel, batch: Batch, what: str, truth: Batch | None = None
) -> Checks:
    truth = batch if truth is None else truth
    stages = dict(model.stages(truth))
    expected = {
        tower_name(t): stages[f"output of tower {t}"].numpy() for t in range(len(model.spec.towers))
    }
    logits = stages["logit"].numpy()
    parts = exported.manifest.parts
    once = set(exported.manifest.inputs.per_request)
    for t, (name, value) in enumerate(expected.items()):
        rows = value[:1] if once & set(model.spec.towers[t].features) else value
        yield _check(name, what, rows, partial(exported.tower, t, batch))
    yield _check("joined", what, logits, lambda: exported.joined(batch))
    if WHOLE in parts:
        yield _check(WHOLE, what, logits, lambda: exported.whole(batch))


def _check(part: str, what: str, expected: FloatArray, run: Callable[[], FloatArray]) -> GraphCheck:
    found = run()
    limit = ATOL + RTOL * float(np.abs(expected).max(initial=0.0))
    if found.shape != expected.shape:
        return GraphCheck(
            part=part,
            what=what,
            rows=len(expected),
            max_abs_diff=None,
            limit=None,
            passed=False,
            found=f"shape {found.shape} instead of {expected.shape}",
        )
    with np.errstate(invalid="ignore"):
        diff = float(np.abs(found - expected).max(initial=0.0))
    return GraphCheck(
        part=part,
        what=what,
        rows=len(expected),
        max_abs_diff=diff,
        limit=limit,
        passed=bool(np.isfinite(diff)) and diff <= limit,
    )


def _refuse(exported: ExportedModel, batch: Batch, what: str) -> Checks:
    runs = {"joined": exported.joined}
    if WHOLE in exported.manifest.parts:
        runs[WHOLE] = exported.whole
    for part, run in runs.items():
        try:
            run(batch)
        except DataError:
            passed, found = True, ""
        else:
            passed, found = False, "was answered"
        yield GraphCheck(
            part=part,
            what=f"refuses {what}",
            rows=batch.num_rows,
            max_abs_diff=None,
            limit=None,
            passed=passed,
            found=found,
        )


def main(folder: str, bundle: str, data: str = "", adapter: str = "") -> int:
    """Print the checks of an export."""
    try:
        if adapter:
            load_adapter(Path(adapter))
        exported = ExportedModel(Path(folder))
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
                sys.stdout.write(json.dumps({"check": check.to_json(), "total": total}) + "\n")
                sys.stdout.flush()
    except DmtError as error:
        sys.stdout.write(json.dumps(error.to_json()) + "\n")
        return 0
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
