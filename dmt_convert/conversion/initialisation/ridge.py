"""Refit a linear layer to given outputs, starting from weights that are already good.

Inputs stay float32; their moments are summed in float64, a block of rows at a time.
Letters: n rows, k inputs, m outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from dmt_convert.arrays import Float64Array, FloatArray

_STRENGTHS: Final = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_PATIENCE: Final = 2
_HELD_OUT: Final = 0.25
_BLOCK_ROWS: Final = 512
MAX_INPUTS: Final = 6_144
"""Widest layer that is refitted: beyond it the normal equations outgrow memory and minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A refitted layer."""

    weight: Float64Array
    """Shape (m, k)."""
    bias: Float64Array
    """Shape (m,)."""
    prior_r2: float
    """Share of the outputs' variance that the prior weights explain on held-out rows."""
    r2: float
    """The same for the refitted weights; never below `prior_r2`."""
    strength: float
    """Ridge strength chosen on held-out rows; infinite if the prior was kept."""


def refit_linear(inputs: FloatArray, targets: FloatArray, prior: Float64Array) -> Refit:
    """Minimise |targets - (inputs weight^T + bias)|^2 + strength |weight - prior|^2.

    The strength is chosen on the last quarter of the rows; the prior itself (with the best
    bias) stays if no refit beats it there. Inputs are scaled to unit variance for the
    penalty, so that it does not depend on their units.

    Args:
        inputs: What the layer sees, shape (n, k).
        targets: What it should give, shape (n, m).
        prior: Weights to start from, shape (m, k).
    """
    problem = _Problem(inputs, targets, prior)
    cut = int(len(inputs) * (1 - _HELD_OUT))
    x, residual = problem.design(slice(cut, len(inputs)))
    y = targets[cut:] - problem.mean_y
    total = float(np.square(y).sum()) or 1.0
    prior_loss = best_loss = float(np.square(residual).sum())
    scaled, best = problem.start, np.inf
    if inputs.shape[1] <= MAX_INPUTS and cut > 1:
        gram, cross = problem.moments(cut)
        diagonal = gram.diagonal().copy()
        rises, last = 0, prior_loss
        for strength in _STRENGTHS:
            delta = _solve(gram, cross, diagonal + strength * cut)
            loss = float(np.square(residual - x @ delta).sum())
            if loss < best_loss * (1 - 1e-9):
                best_loss, best = loss, strength
            rises, last = (rises + 1 if loss >= last else 0), loss
            if rises == _PATIENCE:
                break
        if np.isfinite(best):
            np.fill_diagonal(gram, diagonal)
            gram += x.T @ x
            cross += x.T @ residual
            delta = _solve(gram, cross, gram.diagonal() + best * len(inputs))
            scaled = scaled + delta.T
    weight = scaled / problem.scale
    return Refit(
        weight=weight,
        bias=problem.mean_y - weight @ problem.mean_x,
        prior_r2=1 - prior_loss / total,
        r2=1 - best_loss / total,
        strength=best,
    )


class _Problem:
    """Standardised inputs, and the residual of the prior, in blocks of rows."""

    def __init__(self, inputs: FloatArray, targets: FloatArray, prior: Float64Array) -> None:
        self._inputs, self._targets = inputs, targets
        self.mean_x: Float64Array = inputs.mean(axis=0, dtype=np.float64)
        self.mean_y: Float64Array = targets.mean(axis=0, dtype=np.float64)
        squares = np.zeros(inputs.shape[1])
        for rows in _blocks(len(inputs)):
            squares += np.square(inputs[rows] - self.mean_x).sum(axis=0)
        spread = np.sqrt(squares / max(1, len(inputs)))
        # what varies less than its own rounding is a constant: scaled up, it would be noise
        floor = 1e-12 * max(1.0, float(spread.max(initial=0.0)))
        live = spread > np.maximum(floor, _rounding(inputs) * np.abs(self.mean_x))
        self.scale: Float64Array = np.where(live, spread, 1.0)
        self.start: Float64Array = prior * self.scale

    def design(self, rows: slice) -> tuple[Float64Array, Float64Array]:
        """Return x, shape (rows, k), and the residual of the prior, shape (rows, m)."""
        x: Float64Array = (self._inputs[rows] - self.mean_x) / self.scale
        residual: Float64Array = self._targets[rows] - self.mean_y - x @ self.start.T
        return x, residual

    def moments(self, count: int) -> tuple[Float64Array, Float64Array]:
        """Return x^T x and x^T residual over the first rows, shapes (k, k) and (k, m)."""
        width = self._inputs.shape[1]
        gram, cross = np.zeros((width, width)), np.zeros((width, self._targets.shape[1]))
        for rows in _blocks(count):
            x, residual = self.design(rows)
            gram += x.T @ x
            cross += x.T @ residual
        return gram, cross


def _blocks(count: int) -> list[slice]:
    return [slice(a, min(a + _BLOCK_ROWS, count)) for a in range(0, count, _BLOCK_ROWS)]


def _rounding(values: FloatArray) -> float:
    return float(np.finfo(values.dtype).eps)


def _solve(gram: Float64Array, cross: Float64Array, diagonal: Float64Array) -> Float64Array:
    """Solve with the given diagonal in place of the matrix's own (which is overwritten)."""
    np.fill_diagonal(gram, diagonal)
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    solution: Float64Array = torch.cholesky_solve(torch.from_numpy(cross), factor).numpy()
    return solution
