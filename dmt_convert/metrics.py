"""How good are logits, and how well do two models' logits agree. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well one model's logits follow another's."""

    r2: float
    """1 - sum of squared differences / variance of the reference; 1 is perfect."""
    max_abs_diff: float
    """Largest absolute difference of logits."""
    rank_correlation: float
    """Spearman's rho; 1 where both rank all rows alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How well logits predict labels."""

    auc: float | None
    """Area under the ROC curve; None where only one class occurs."""
    log_loss: float
    """Mean negative log likelihood, in nats."""
    ne: float | None
    """Normalised entropy: log loss over that of always predicting the mean label (He et al.,
    ADKDD 2014); None where only one class occurs."""
    losses: tuple[float, ...] = ()
    """Mean loss of every block of rows, in nats, for `compare_losses`; empty if not asked for."""


def measure_agreement(reference: Array, other: Array) -> Agreement:
    """Compare logits of the same rows, each of shape (n,)."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    spread = float(np.square(a - a.mean()).sum())
    error = float(np.square(a - b).sum())
    if spread > 0:
        r2 = 1 - error / spread
    else:
        r2 = 1.0 if error == 0 else -np.inf
    return Agreement(
        r2=r2,
        max_abs_diff=float(np.abs(a - b).max(initial=0.0)),
        rank_correlation=_correlation(rank(a), rank(b)),
    )


def measure_accuracy(
    logits: Array, labels: Array, *, blocks: npt.NDArray[np.integer] | None = None
) -> Accuracy:
    """Measure logits against labels of 0 or 1.

    Args:
        logits: Shape (n,).
        labels: Shape (n,).
        blocks: The block, from 0, that every row belongs to, shape (n,); each has rows.
    """
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    # log(1 + e^z) - y z, without overflow
    each = np.logaddexp(0.0, z) - y * z
    loss = float(np.mean(each))
    losses: tuple[float, ...] = ()
    if blocks is not None:
        losses = tuple((np.bincount(blocks, each) / np.bincount(blocks)).tolist())
    rate = float(y.mean())
    if not 0 < rate < 1:
        return Accuracy(auc=None, log_loss=loss, ne=None, losses=losses)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    auc = area_under_curve(z, y)
    return Accuracy(auc=auc, log_loss=loss, ne=float(loss / entropy), losses=losses)


def compare_losses(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Compare two models by their losses on the same blocks of rows.

    Returns:
        How much lower the mean loss is after, in nats; and the standard error of that, which
        knows that hard rows are hard for both. Infinite if there are fewer than two blocks.
    """
    gains = np.subtract(before, after)
    if len(gains) < 2:
        return float(gains.sum()), np.inf
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5)


def area_under_curve(logits: Array, labels: Array) -> float:
    """Area under the ROC curve: the chance that a positive ranks above a negative."""
    positive = labels > 0.5
    count = int(positive.sum())
    others = len(labels) - count
    total = float(rank(logits)[positive].sum())
    return (total - count * (count + 1) / 2) / (count * others)


def compare_auc(reference: Array, other: Array, labels: Array) -> tuple[float, float] | None:
    """Return how much less AUC `other` has on the same rows, and the standard error of that.

    The error is DeLong's, of two correlated curves (DeLong et al., Biometrics 1988): rows that both
    models rank alike do not add to it.

    Args:
        reference: Logits, shape (n,).
        other: Logits of another model.
        labels: 0 or 1.

    Returns:
        None if a class has fewer than two rows.
    """
    positive = labels > 0.5
    sizes = int(positive.sum()), int((~positive).sum())
    if min(sizes) < 2:
        return None
    beaten = []
    for logits in (reference, other):
        everywhere = rank(logits)
        # per row, the share of the other class that is on the right side of it
        beaten.append(
            (
                (everywhere[positive] - rank(logits[positive])) / sizes[1],
                1 - (everywhere[~positive] - rank(logits[~positive])) / sizes[0],
            )
        )
    differences = [a - b for a, b in zip(*beaten, strict=True)]
    variance = sum(
        float(each.var(ddof=1)) / size for each, size in zip(differences, sizes, strict=True)
    )
    return float(differences[0].mean()), float(np.sqrt(variance))


def rank(values: Array) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    x, y = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    if scale == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float((x * y).sum()) / scale
