"""Refit a linear layer to given outputs, starting from weights that are already good.

Letters: n rows, k inputs, m outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_STRENGTHS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_HELD_OUT: Final = 0.25
MAX_INPUTS: Final = 6_144
"""Widest layer that is refitted: beyond it the normal equations outgrow memory and minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A refitted layer."""

    weight: Array
    """Shape (m, k)."""
    bias: Array
    """Shape (m,)."""
    prior_r2: float
    """Share of the outputs' variance that the prior weights explain on held-out rows."""
    r2: float
    """The same for the refitted weights; never below `prior_r2`."""
    strength: float
    """Ridge strength chosen on held-out rows; infinite where the prior was kept."""


def refit_linear(
    inputs: npt.NDArray[np.floating], targets: npt.NDArray[np.floating], prior: Array
) -> Refit:
    """Minimise |targets - (inputs weight^T + bias)|^2 + strength |weight - prior|^2.

    The strength is chosen on the last quarter of the rows; the prior itself (with the best
    bias) stays where no refit beats it there. Inputs are scaled to unit variance for the
    penalty, so that it does not depend on their units.

    Args:
        inputs: What the layer sees, shape (n, k).
        targets: What it should give, shape (n, m).
        prior: Weights to start from, shape (m, k).
    """
    cut = int(len(inputs) * (1 - _HELD_OUT))
    fit, held = slice(0, cut), slice(cut, None)
    mean_x = inputs.mean(axis=0, dtype=np.float64)
    mean_y = targets.mean(axis=0, dtype=np.float64)
    scale = inputs.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-12 * max(1.0, float(scale.max(initial=0.0))), scale, 1.0)
    x = (inputs - mean_x) / scale
    y = targets - mean_y
    start = prior * scale
    residual = y - x @ start.T
    total = float(np.square(y[held]).sum()) or 1.0
    best_loss, best = float(np.square(residual[held]).sum()), np.inf
    prior_loss = best_loss
    if x.shape[1] <= MAX_INPUTS and cut > 1:
        gram, cross = x[fit].T @ x[fit], x[fit].T @ residual[fit]
        for strength in _STRENGTHS:
            delta = _solve(gram, cross, strength * cut)
            loss = float(np.square(residual[held] - x[held] @ delta).sum())
            if loss < best_loss * (1 - 1e-9):
                best_loss, best = loss, strength
    scaled = start
    if np.isfinite(best):
        delta = _solve(x.T @ x, x.T @ residual, best * len(x))
        scaled = start + delta.T
    weight = scaled / scale
    return Refit(
        weight=weight,
        bias=mean_y - weight @ mean_x,
        prior_r2=1 - prior_loss / total,
        r2=1 - best_loss / total,
        strength=best,
    )


def _solve(gram: Array, cross: Array, penalty: float) -> Array:
    damped = gram + penalty * np.eye(len(gram))
    solution: Array = np.linalg.solve(damped, cross)
    return solution
