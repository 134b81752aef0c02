"""The quality table as data: what each way of initialising keeps of the flat model. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One model on the held-out rows."""

    name: str
    """flat, closed form, distilled, passthrough, random initialisation; fine-tuned, which is
    measured on the validation rows of its training and not on those of the other rows."""
    r2: float | None
    """1 - squared error of the logits / their variance in the flat model."""
    max_abs_diff: float | None
    """Largest absolute difference of logits from the flat model."""
    rank_correlation: float | None
    """Spearman's rho with the flat model's logits."""
    auc: float | None = None
    """Where labels are known."""
    log_loss: float | None = None
    """Where labels are known, in nats."""
    ne: float | None = None
    """Normalised entropy, where labels are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The quality table of a conversion."""

    rows: tuple[QualityRow, ...]
    """The flat model first, then the converted one, then yardsticks."""
    data: str
    """What the held-out rows are."""
    count: int
    """How many held-out rows."""
    labelled: bool
    """Whether they have labels."""

    @property
    def converted(self) -> QualityRow:
        """The row of the model that was written: the last one before the yardstick."""
        own = [row for row in self.rows[1:] if row.name != "random initialisation"]
        return own[-1]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; what is not finite (R^2 of constant logits) becomes None."""
        value = asdict(self)
        value["rows"] = [
            {key: None if isinstance(x, float) and not isfinite(x) else x for key, x in row.items()}
            for row in value["rows"]
        ]
        return value
