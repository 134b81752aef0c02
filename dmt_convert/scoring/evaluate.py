"""Score a model into a file, or measure it on labelled data."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmt_convert.documents import InputRecord
from dmt_convert.files import SCORES_FILE, check_output, staged_file
from dmt_convert.metrics import measure_accuracy
from dmt_convert.progress import Progress, no_progress
from dmt_convert.scoring.scored_model import ScoredModel, Scores, score_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `dmt evaluate` reports."""

    auc: float | None
    """Area under the ROC curve; None where only one class occurs."""
    log_loss: float
    """Mean negative log likelihood, in nats."""
    ne: float | None
    """Normalised entropy; None where only one class occurs."""
    rows: int
    """Rows evaluated."""
    rows_per_s: float
    """Rows read and scored per second."""
    inputs: InputRecord
    """Which columns of the data fed the model."""


def evaluate_model(
    model: ScoredModel,
    data: Path,
    *,
    max_rows: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure AUC, log loss and NE.

    Args:
        model: The model.
        data: Labelled data.
        max_rows: Use at most this many rows.
        progress: Told of the rows that are scored.

    Raises:
        DataError: The data has no labels, or does not fit the model.
    """
    scores = score_data(model, data, max_rows=max_rows, needs_labels=True, progress=progress)
    assert scores.labels is not None
    if scores.labels.min() == scores.labels.max():
        _log.warning(
            "%s: all %s rows have the label %g: AUC and NE do not exist",
            data,
            scores.rows,
            scores.labels[0],
        )
    accuracy = measure_accuracy(scores.logits, scores.labels)
    return Evaluation(
        auc=accuracy.auc,
        log_loss=accuracy.log_loss,
        ne=accuracy.ne,
        rows=scores.rows,
        rows_per_s=scores.rows_per_s,
        inputs=scores.inputs,
    )


def score_to_file(
    model: ScoredModel,
    data: Path,
    out: Path,
    *,
    progress: Progress = no_progress,
) -> Scores:
    """Write the logits of every row to an npz, array `logits`, whole or not at all.

    Args:
        model: The model.
        data: The data set.
        out: The file to write.
        progress: Told of the rows that are scored.

    Raises:
        ConfigError: The file cannot be written, is read, or is something else.
        DataError: The data does not fit the model.
    """
    check_output(out, SCORES_FILE, models=[model.path, *model.files], inputs=[data])
    scores = score_data(model, data, progress=progress)
    with staged_file(out) as staged, staged.open("xb") as file:
        np.savez(file, logits=scores.logits)
    return replace(scores, path=out)
