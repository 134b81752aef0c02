"""What quantised tables cost, before anything is written.

Letters: n rows of data, R rows of a table, N embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, gather_rows
from dmt_convert.data import Batch, adapt_batches, open_data, take_rows
from dmt_convert.errors import DataError, ExportError
from dmt_convert.metrics import measure_accuracy, measure_agreement
from dmt_convert.model import RowCode, recode_rows
from dmt_convert.serving.check_batches import generate_batch
from dmt_convert.serving.export_manifest import TableCode
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.quantised_tables import coded_bytes

Progress = Callable[[str, int, int], None]
FloatArray = npt.NDArray[np.float32]

GENERATED_ROWS: Final = 4096
"""Rows that are generated where no data is given."""
_BATCH_ROWS: Final = 2048
_SAMPLED_ROWS: Final = 1 << 19
"""Rows of tables that are looked at in all; small tables are looked at whole."""
_LEAST_ROWS: Final = 1024
"""Rows that are looked at of every table, however many tables there are."""
_RUN_ROWS: Final = 64
"""Sampled rows come in runs of so many: single ones would each cost a page of the disk."""


def measure_quantisation(
    bundle: Bundle,
    inputs: GraphInputs,
    code: TableCode,
    data: Path | None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Say how far quantised tables are from the stored ones, and what that does to the logits.

    Args:
        bundle: The bundle; nothing is written.
        inputs: The form of generated rows.
        code: How tables are to be stored.
        data: Rows to score; without, rows are generated.
        progress: Told of step, done and total.

    Returns:
        JSON-able: code; tables: name -> rows, rows_measured, relative_rms (root of squared errors
        over squared values) and max_abs_error; relative_rms over all tables; bytes_before and
        bytes_after of the tables; logits: data, rows, r2 and max_abs_diff. With labels also
        log_loss, and where both classes occur auc and ne, each before, after and lost. Empty
        where nothing is quantised.

    Raises:
        DataError: The data does not fit the model.
        ExportError: The code does not take a row that was looked at.
    """
    if code == "none":
        return {}
    tables = bundle.manifest.model.flat.tables
    return {
        "code": code,
        **_measure_tables(bundle, code, progress),
        "bytes_before": sum(table.nbytes for table in tables),
        "bytes_after": sum(coded_bytes(table, code) for table in tables),
        **_measure_logits(bundle, inputs, code, data, progress),
    }


def check_auc_limit(limit: float | None, code: TableCode, data: Path | None) -> None:
    """Refuse a limit for the AUC lost that cannot be held against anything.

    Raises:
        ExportError: It is no number from 0 on, or there is no labelled data.
        DataError: The data cannot be read.
    """
    if limit is None:
        return
    if not 0 <= limit < math.inf:
        raise ExportError(
            f"--max-auc-loss {limit}",
            expected="how much AUC may be lost, 0 or more",
            hint="for example --max-auc-loss 0.0005",
        )
    if code != "none" and (data is None or not open_data(data).has_labels):
        raise ExportError(
            "--max-auc-loss without labelled data"
            + ("" if data is None else f": {data} has no labels"),
            expected="rows with a label of 0 or 1 each, to measure AUC on",
            hint="give such rows with --data, or leave --max-auc-loss out",
        )


def check_auc_lost(quality: Mapping[str, Any], limit: float | None) -> None:
    """Refuse what quantisation costs.

    Args:
        quality: What `measure_quantisation` returned.
        limit: Largest loss of AUC; None for any.

    Raises:
        ExportError: More is lost, or it cannot be told.
    """
    if limit is None or not quality:
        return
    if "auc" not in quality:
        raise ExportError(
            "--max-auc-loss with data whose labels are all the same",
            expected="rows of both classes, to measure AUC on",
            hint="give other rows with --data, or leave --max-auc-loss out",
        )
    lost = quality["auc"]["lost"]
    if not lost <= limit:
        raise ExportError(
            f"--quantize {quality['code']} loses {lost:.6f} of the AUC "
            f"({quality['auc']['before']:.6f} -> {quality['auc']['after']:.6f})",
            expected=f"at most {limit:g}, as --max-auc-loss says",
            hint="use a finer code (int4 < int8 < fp16 < none), or allow more",
        )


def _measure_tables(bundle: Bundle, code: RowCode, progress: Progress) -> dict[str, Any]:
    infos = {
        name.removeprefix("tables.").removesuffix(".weight"): info
        for tensors in bundle.towers
        for name, info in tensors.items()
        if name.startswith("tables.")
    }
    share = max(_LEAST_ROWS, _SAMPLED_ROWS // max(1, len(infos)))
    measured, squares, errors = {}, 0.0, 0.0
    for done, (table, info) in enumerate(infos.items()):
        progress("measuring tables", done, len(infos))
        values, square, error = _measure_table(table, info, code, share)
        measured[table] = values
        weight = values["rows"] / values["rows_measured"]
        squares, errors = squares + weight * square, errors + weight * error
    progress("measuring tables", len(infos), len(infos))
    return {"tables": measured, "relative_rms": _relative(errors, squares)}


def _measure_table(
    table: str, info: TensorInfo, code: RowCode, share: int
) -> tuple[dict[str, Any], float, float]:
    """Compare some rows with what their code gives back; returns also sums of squares."""
    square = error = largest = 0.0
    count = 0
    for index in _pick_rows(info.shape[0], share):
        rows = gather_rows(info, index)
        diff = recode_rows(rows, code, partial(_name_row, table, index)) - rows
        square += float(np.square(rows, dtype=np.float64).sum())
        error += float(np.square(diff, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(diff).max()))
        count += len(index)
    values = {
        "rows": info.shape[0],
        "rows_measured": count,
        "relative_rms": _relative(error, square),
        "max_abs_error": largest,
    }
    return values, square, error


def _name_row(table: str, index: npt.NDArray[np.int64], row: int) -> str:
    return f"row {index[row]} of table {table!r}"


def _pick_rows(rows: int, share: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows to look at: all, or runs of rows, the first and the last row among them."""
    if rows <= share:
        begins = np.arange(0, rows, _RUN_ROWS)
    else:
        # one run in every stretch of the table
        count = share // _RUN_ROWS
        edges = np.linspace(0, rows - _RUN_ROWS, count).astype(np.int64)
        jitter = np.random.default_rng(rows).random(count - 2)
        begins = edges.copy()
        begins[1:-1] += (jitter * (edges[2:] - edges[1:-1] - _RUN_ROWS).clip(0)).astype(np.int64)
    for first in range(0, len(begins), _BATCH_ROWS // _RUN_ROWS):
        some = begins[first : first + _BATCH_ROWS // _RUN_ROWS]
        index = np.unique((some[:, None] + np.arange(_RUN_ROWS)).reshape(-1))
        yield index[index < rows]


def _relative(error: float, square: float) -> float:
    return math.sqrt(error / square) if square > 0 else 0.0


def _measure_logits(
    bundle: Bundle, inputs: GraphInputs, code: RowCode, data: Path | None, progress: Progress
) -> dict[str, Any]:
    models = [open_bundle_model(bundle), open_bundle_model(bundle, code=code)]
    batches, total = _batches(bundle, inputs, data)
    parts: list[list[FloatArray]] = []
    labels: list[FloatArray | None] = []
    done = 0
    with torch.inference_mode():
        for batch in batches:
            parts.append([model(batch).numpy() for model in models])
            labels.append(batch.labels)
            done += batch.num_rows
            progress("measuring logits", done, total)
    if not parts:
        raise DataError(
            f"{data} has no rows",
            expected="at least one row to score",
            hint="name a data set that has rows",
        )
    before, after = (np.concatenate(logits) for logits in zip(*parts, strict=True))
    agreement = measure_agreement(before, after)
    name = "generated rows" if data is None else data.name
    logits = {
        "data": name,
        "rows": len(before),
        # of logits that are all the same there is none
        "r2": agreement.r2 if math.isfinite(agreement.r2) else None,
        "max_abs_diff": agreement.max_abs_diff,
    }
    known = [part for part in labels if part is not None]
    if len(known) < len(labels):
        return {"logits": logits}
    return {"logits": logits, **_compare_accuracy(before, after, np.concatenate(known))}


def _batches(bundle: Bundle, inputs: GraphInputs, data: Path | None) -> tuple[Iterator[Batch], int]:
    spec = bundle.manifest.model.flat
    if data is not None:
        dataset = open_data(data)
        batches = dataset.batches(_BATCH_ROWS)
        return adapt_batches(dataset, spec, batches), dataset.num_rows
    every = replace(inputs, per_request=(), dense_per_request=False)
    batch = generate_batch(spec, every, GENERATED_ROWS, seed=0)
    slices = range(0, GENERATED_ROWS, _BATCH_ROWS)
    return (take_rows(batch, slice(a, a + _BATCH_ROWS)) for a in slices), GENERATED_ROWS


def _compare_accuracy(before: FloatArray, after: FloatArray, labels: FloatArray) -> dict[str, Any]:
    old, new = measure_accuracy(before, labels), measure_accuracy(after, labels)
    pairs = {
        "auc": (old.auc, new.auc),
        "log_loss": (old.log_loss, new.log_loss),
        "ne": (old.ne, new.ne),
    }
    return {
        # of a loss, what is lost is what it grows by
        key: {"before": a, "after": b, "lost": a - b if key == "auc" else b - a}
        for key, (a, b) in pairs.items()
        if a is not None and b is not None
    }
