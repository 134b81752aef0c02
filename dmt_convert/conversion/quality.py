"""The quality table: how well each way of initialising agrees with the flat model.

torch is imported when a model is run: documents and reports only read the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.conversion.sample import Sample
from dmt_convert.data import Batch, take_rows
from dmt_convert.documents import Quality, QualityRow
from dmt_convert.metrics import measure_accuracy, measure_agreement

if TYPE_CHECKING:
    from torch import nn

_BATCH: Final = 1024


def compare_models(flat: nn.Module, candidates: Mapping[str, nn.Module], held: Sample) -> Quality:
    """Compare converted models with the flat one on held-out rows.

    Args:
        flat: The flat model.
        candidates: Name -> model.
        held: Rows that no fit has seen.
    """
    reference = logits_of(flat, held.batch)
    labels = held.batch.labels
    rows = []
    for name, model in {"flat": flat, **candidates}.items():
        logits = reference if model is flat else logits_of(model, held.batch)
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


def logits_of(model: nn.Module, batch: Batch) -> Float32Array:
    """Logits of many rows, some at a time, shape (B,)."""
    import torch

    parts = []
    with torch.inference_mode():
        for begin in range(0, batch.num_rows, _BATCH):
            end = min(begin + _BATCH, batch.num_rows)
            parts.append(model(take_rows(batch, slice(begin, end))).numpy())
    return np.concatenate(parts)
