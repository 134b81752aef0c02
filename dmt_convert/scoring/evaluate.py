"""Score a model into a file, or measure it on labelled data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmt_convert.errors import ConfigError, DataError
from dmt_convert.metrics import Agreement, measure_accuracy, measure_agreement
from dmt_convert.scoring.scored_model import ScoredModel, score_data

Progress = Callable[[int, int], None]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """What `dmt score` reports."""

    out: Path
    """The file written: an npz with the array `logits`."""
    rows: int
    """Rows scored."""
    rows_per_s: float
    """Rows read and scored per second."""
    truth: Agreement | None
    """Agreement with the original logits, where the data holds them."""
    truth_scale: float | None
    """Largest absolute original logit, where the data holds them."""


def evaluate_model(
    model: ScoredModel,
    data: Path,
    *,
    max_rows: int | None = None,
    on_rows: Progress = lambda done, total: None,
) -> Evaluation:
    """Measure AUC, log loss and NE.

    Raises:
        DataError: The data has no labels, or does not fit the model.
    """
    scores = score_data(model, data, max_rows=max_rows, on_rows=on_rows)
    if scores.labels is None:
        raise DataError(
            f"{data} has no labels",
            expected="a label of 0 or 1 for every row",
            hint="use `dmt score` for data without labels",
        )
    accuracy = measure_accuracy(scores.logits, scores.labels)
    return Evaluation(
        auc=accuracy.auc,
        log_loss=accuracy.log_loss,
        ne=accuracy.ne,
        rows=len(scores.logits),
        rows_per_s=len(scores.logits) / max(scores.seconds, 1e-9),
    )


def score_to_file(
    model: ScoredModel,
    data: Path,
    out: Path,
    *,
    max_rows: int | None = None,
    on_rows: Progress = lambda done, total: None,
) -> ScoreReport:
    """Write the logits of every row to an npz, array `logits`, whole or not at all.

    Raises:
        ConfigError: The file cannot be written.
        DataError: The data does not fit the model.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(
            f"--out {out} cannot be written",
            expected="a file in an existing folder",
            hint=f"mkdir -p {out.parent}" if not out.parent.is_dir() else "name a file",
        )
    if out.exists() and any(out.samefile(path) for path in (data, model.path) if path.exists()):
        raise ConfigError(
            f"--out {out} is what would be read",
            expected="a file of its own for the scores",
            hint="choose another --out",
        )
    scores = score_data(model, data, max_rows=max_rows, on_rows=on_rows)
    staged = out.parent / f".{out.name}.dmt-tmp-{os.getpid()}"
    try:
        with staged.open("xb") as file:
            np.savez(file, logits=scores.logits)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(out)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror})",
            expected="a file that can be written, on a disk with space",
            hint="choose another --out",
        ) from None
    finally:
        staged.unlink(missing_ok=True)
    truth = None if scores.truth is None else measure_agreement(scores.truth, scores.logits)
    return ScoreReport(
        out=out,
        rows=len(scores.logits),
        rows_per_s=len(scores.logits) / max(scores.seconds, 1e-9),
        truth=truth,
        truth_scale=None if scores.truth is None else float(np.abs(scores.truth).max()),
    )
