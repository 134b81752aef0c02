"""Refit a linear layer to given outputs, starting from weights that are already good.

Inputs stay float32, and may be computed a block of rows at a time; their moments are summed in
float64. Letters: n rows, k inputs, m outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray

_STRENGTHS: Final = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_PATIENCE: Final = 2
_HELD_OUT: Final = 0.25
_BLOCK_ROWS: Final = 512
_BLOCK_ELEMENTS: Final = 1 << 22
_KEPT_ELEMENTS: Final = 1 << 23
"""Computed rows are kept up to 32 MiB, which 16,384 rows of the pairs of 26 features fit into."""
MAX_INPUTS: Final = 6_144
"""Widest layer that is refitted: beyond it the normal equations outgrow memory and minutes."""


class Rows(Protocol):
    """Rows of a matrix, given block by block: an array, or `ComputedRows`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k)."""

    def __getitem__(self, rows: slice, /) -> FloatArray:
        """Return some rows."""


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """Rows that are computed whenever they are asked for, because all at once are too many."""

    shape: tuple[int, int]
    """(n, k)."""
    compute: Callable[[slice], Float32Array]
    """Gives some rows."""

    def __getitem__(self, rows: slice) -> Float32Array:
        """Compute some rows."""
        return self.compute(rows)

    def kept_if_small(self) -> Rows:
        """Return all rows as one array if that takes little memory: they are read several times."""
        count, width = self.shape
        if not count or count * width > _KEPT_ELEMENTS:
            return self
        steps = range(0, count, _BLOCK_ROWS)
        return np.concatenate([self[slice(a, min(a + _BLOCK_ROWS, count))] for a in steps])


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


def refit_linear(inputs: Rows, targets: FloatArray, prior: FloatArray) -> Refit:
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
    (count, width), outputs = inputs.shape, targets.shape[1]
    cut = int(count * (1 - _HELD_OUT))
    held = slice(cut, count)
    total = float(np.square(targets[held] - problem.mean_y).sum()) or 1.0
    prior_loss = best_loss = problem.loss(held)
    scaled, best = problem.start, np.inf
    if width <= MAX_INPUTS and cut > 1:
        gram, cross = np.zeros((width, width)), np.zeros((width, outputs))
        problem.add_moments(slice(0, cut), gram, cross)
        diagonal = gram.diagonal().copy()
        rises, last = 0, prior_loss
        for strength in _STRENGTHS:
            loss = problem.loss(held, _solve(gram, cross, diagonal + strength * cut))
            if loss < best_loss * (1 - 1e-9):
                best_loss, best = loss, strength
            rises, last = (rises + 1 if loss >= last else 0), loss
            if rises == _PATIENCE:
                break
        if np.isfinite(best):
            np.fill_diagonal(gram, diagonal)
            problem.add_moments(held, gram, cross)
            delta = _solve(gram, cross, gram.diagonal() + best * count)
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

    def __init__(self, inputs: Rows, targets: FloatArray, prior: FloatArray) -> None:
        self._inputs, self._targets = inputs, targets
        count, width = inputs.shape
        self.mean_y: Float64Array = targets.mean(axis=0, dtype=np.float64)
        self.mean_x: Float64Array = np.zeros(width)
        self._step = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, width)))
        for rows in self._blocks(slice(0, count)):
            self.mean_x += inputs[rows].sum(axis=0, dtype=np.float64)
        self.mean_x /= max(1, count)
        squares, rounding = np.zeros(width), 0.0
        for rows in self._blocks(slice(0, count)):
            x = inputs[rows]
            squares += np.square(x - self.mean_x).sum(axis=0)
            rounding = _rounding(x)
        spread = np.sqrt(squares / max(1, count))
        # what varies less than its own rounding is a constant: scaled up, it would be noise
        floor = 1e-12 * max(1.0, float(spread.max(initial=0.0)))
        live = spread > np.maximum(floor, rounding * np.abs(self.mean_x))
        self.scale: Float64Array = np.where(live, spread, 1.0)
        self.start: Float64Array = prior * self.scale

    def loss(self, rows: slice, delta: Float64Array | None = None) -> float:
        """Squared error of the prior, or of the prior and a change of shape (k, m)."""
        total = 0.0
        for block in self._blocks(rows):
            x, residual = self._design(block)
            error = residual if delta is None else residual - x @ delta
            total += float(np.square(error).sum())
        return total

    def add_moments(self, rows: slice, gram: Float64Array, cross: Float64Array) -> None:
        """Add x^T x and x^T residual of some rows, shapes (k, k) and (k, m)."""
        for block in self._blocks(rows):
            x, residual = self._design(block)
            # in place: the product by itself would be a second matrix of that size
            torch.from_numpy(gram).addmm_(torch.from_numpy(x.T), torch.from_numpy(x))
            cross += x.T @ residual

    def _blocks(self, rows: slice) -> list[slice]:
        begins = range(rows.start, rows.stop, self._step)
        return [slice(a, min(a + self._step, rows.stop)) for a in begins]

    def _design(self, rows: slice) -> tuple[Float64Array, Float64Array]:
        """Return x, shape (rows, k), and the residual of the prior, shape (rows, m)."""
        x: Float64Array = (self._inputs[rows] - self.mean_x) / self.scale
        residual: Float64Array = self._targets[rows] - self.mean_y - x @ self.start.T
        return x, residual


def _rounding(values: FloatArray) -> float:
    return float(np.finfo(values.dtype).eps)


def _solve(gram: Float64Array, cross: Float64Array, diagonal: Float64Array) -> Float64Array:
    """Solve with the given diagonal in place of the matrix's own (which is overwritten)."""
    np.fill_diagonal(gram, diagonal)
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    solution: Float64Array = torch.cholesky_solve(torch.from_numpy(cross), factor).numpy()
    return solution
