"""The quality table: how well each way of initialising agrees with the flat model.

torch is imported when a model is run: documents and reports only read the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dmt_convert.arrays import Float32Array
from dmt_convert.conversion.sample import Sample
from dmt_convert.data import Batch, take_rows
from dmt_convert.metrics import measure_accuracy, measure_agreement

if TYPE_CHECKING:
    from torch import nn

_BATCH: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One model on the held-out rows."""

    name: str
    """flat, closed form, distilled, passthrough, random initialisation or fine-tuned. The last is
    measured on the validation rows of its training, not on the rows of the others."""
    r2: float | None
    """1 - squared error of the logits / their variance in the flat model."""
    max_abs_diff: float | None
    """Largest absolute difference of logits from the flat model."""
    rank_correlation: float | None
    """Spearman's rho with the flat model's logits."""
    auc: float | None = None
    """Area under the ROC curve, if labels are known."""
    log_loss: float | None = None
    """Log loss in nats, if labels are known."""
    ne: float | None = None
    """Normalised entropy, if labels are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The quality table of a conversion."""

    rows: tuple[QualityRow, ...]
    """The flat model first, then the converted one, then yardsticks."""
    data: str
    """Description of the held-out rows."""
    count: int
    """Number of held-out rows."""
    labelled: bool
    """Whether they have labels."""

    @property
    def converted(self) -> QualityRow:
        """The row of the model that was written: the last one before the yardstick."""
        own = [row for row in self.rows[1:] if row.name != "random initialisation"]
        return own[-1]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; a number that is not finite becomes None."""
        value = asdict(self)
        value["rows"] = [
            {key: None if isinstance(x, float) and not isfinite(x) else x for key, x in row.items()}
            for row in value["rows"]
        ]
        return value


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
