"""The quality table: how well each way of initialising agrees with the flat model.

torch is imported when a model is run: documents and reports only read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.conversion.sample import Sample
from dmt_convert.data import Batch, take_rows
from dmt_convert.documents import FAIR_R2, Frontier, Quality, QualityRow
from dmt_convert.metrics import measure_accuracy, measure_agreement

if TYPE_CHECKING:
    from torch import nn

    from dmt_convert.model import FlatModel

_BATCH: Final = 1024
_BLOCK_ELEMENTS: Final = 1 << 23


def compare_models(
    flat: FlatModel, candidates: Mapping[str, Callable[[], nn.Module]], held: Sample
) -> Quality:
    """Compare converted models with the flat one on held-out rows.

    Args:
        flat: The flat model.
        candidates: Name -> gives the model, which is let go before the next is asked for.
        held: Rows that no fit has seen.
    """
    at_once = max(16, min(_BATCH, _BLOCK_ELEMENTS // sum(flat.spec.input_dims)))
    reference = logits_of(flat, held.batch, at_once)
    labels = held.batch.labels
    rows = []
    for name, find_model in {"flat": None, **candidates}.items():
        logits = reference if find_model is None else logits_of(find_model(), held.batch, at_once)
        agreement = measure_agreement(reference, logits)
        accuracy = None if labels is None else measure_accuracy(logits, labels)
        rows.append(
            QualityRow(
                name=name,
                r2=agreement.r2,
                max_abs_diff=agreement.max_abs_diff,
                rank_correlation=agreement.rank_correlation,
                auc=None if accuracy is None else accuracy.auc,
                log_loss=None if accuracy is None else accuracy.log_loss,
                ne=None if accuracy is None else accuracy.ne,
            )
        )
    return Quality(
        rows=tuple(rows),
        data=held.description,
        count=held.batch.num_rows,
        labelled=labels is not None,
    )


def describe_weakness(quality: Quality, frontier: Frontier | None = None) -> str | None:
    """Say that a converted model agrees badly with the flat one, and what helps; None: it does not.

    Args:
        quality: What `compare_models` found.
        frontier: What other compressions cost.
    """
    r2 = quality.converted.r2
    if r2 is not None and r2 >= FAIR_R2:
        return None
    found = "not finite" if r2 is None or not math.isfinite(r2) else f"{r2:.3f}"
    better = None if frontier is None else frontier.fewest_fair
    advice = "Give" if better is None else f"{better.advice}. Or give"
    return (
        f"R^2 of the logits is {found}, below {FAIR_R2}: this start is not the flat model. "
        f"{advice} --calibration rows of the model's own data, a smaller --compression or larger "
        "--dim, more --distill-steps, or --tower-module passthrough; or fine-tune before serving"
    )


def logits_of(model: nn.Module, batch: Batch, at_once: int = _BATCH) -> Float32Array:
    """Logits of many rows, some at a time, shape (B,)."""
    import torch

    parts = []
    with torch.inference_mode():
        for begin in range(0, batch.num_rows, at_once):
            end = min(begin + at_once, batch.num_rows)
            parts.append(model(take_rows(batch, slice(begin, end))).numpy())
    return np.concatenate(parts)
