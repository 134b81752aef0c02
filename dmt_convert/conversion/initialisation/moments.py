"""Second moments of many columns, as a matrix or as the few rows that they come from.

A tower of thousands of features is as wide as its embeddings together, M_t, and a matrix of (M_t,
M_t) outgrows memory. But a sample of n < M_t rows spans n directions only, so the n scaled rows
hold the same in less.

Letters: n rows, M_t columns, k chosen columns, m rows of a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray
from dmt_convert.conversion.initialisation.closed_form import Indices

_EXACT_WIDTH = 1024
_SKETCH_ROWS = 256
_RIDGE = 1e-6


def second_moment(samples: Float32Array, *, centred: bool) -> Moment:
    """Return the mean outer product of some rows, shape (M_t, M_t), in the form that takes less.

    Args:
        samples: Shape (n, M_t).
        centred: Whether the mean is taken off first: a covariance.
    """
    values = samples.astype(np.float64)
    if centred:
        values -= values.mean(axis=0)
    count, width = values.shape
    if count < width:
        values /= np.sqrt(count)
        return RowMoment(values)
    return MatrixMoment(values.T @ values / count)


class Moment(ABC):
    """A positive semi-definite matrix C, shape (M_t, M_t)."""

    @property
    @abstractmethod
    def diagonal(self) -> Float64Array:
        """Its diagonal, shape (M_t,)."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The largest rank that it can have."""

    @abstractmethod
    def row(self, k: int) -> Float64Array:
        """One of its rows, shape (M_t,)."""

    @abstractmethod
    def mapped(self, matrix: Float64Array) -> Float64Array:
        """Return A C, shape (r, M_t), for A of shape (r, M_t)."""

    @abstractmethod
    def root(self) -> Float64Array:
        """Return A with A^T A = C, shape (rank, M_t); of wide ones A^T A only estimates C."""

    @abstractmethod
    def trace_of_product(self, roots: Moment) -> float:
        """Return tr(B C) for another moment B of the same rows and columns."""

    @abstractmethod
    def regressed(self, weight: FloatArray, chosen: Indices) -> Float64Array:
        """Return A B with x - mean ~ B (x_chosen - mean), shape (m, k).

        Args:
            weight: A, shape (m, M_t).
            chosen: Columns on which all others are regressed; they stand for themselves.
        """


class MatrixMoment(Moment):
    """The matrix itself."""

    def __init__(self, matrix: Float64Array) -> None:
        self.matrix = matrix

    @property
    def diagonal(self) -> Float64Array:
        """Its diagonal."""
        return np.array(np.diag(self.matrix))

    @property
    def rank(self) -> int:
        """Its width."""
        return len(self.matrix)

    def row(self, k: int) -> Float64Array:
        """One of its rows."""
        found: Float64Array = self.matrix[k]
        return found

    def mapped(self, matrix: Float64Array) -> Float64Array:
        """Return A C."""
        return np.asarray(matrix @ self.matrix)

    def root(self) -> Float64Array:
        """Return A with A^T A = C, of wide ones with A^T A ~ C.

        Beyond 1,024 columns the eigenvectors take longer than all else; 256 random combinations
        of the rows of a Cholesky factor keep every gain to within some per cent.
        """
        width = len(self.matrix)
        if width <= _EXACT_WIDTH:
            values, axes = np.linalg.eigh(self.matrix)
            keep = values > max(float(values.max(initial=0.0)), 0.0) * 1e-6
            exact: Float64Array = (axes[:, keep] * np.sqrt(values[keep])).T
            return exact
        damping = 1e-9 * max(float(np.trace(self.matrix)) / width, 1e-30)
        factor = np.linalg.cholesky(self.matrix + damping * np.eye(width))
        return _sketch(np.asarray(factor.T, dtype=np.float64))

    def trace_of_product(self, roots: Moment) -> float:
        """Sum of the products of all elements."""
        assert isinstance(roots, MatrixMoment)
        return float(np.vdot(roots.matrix, self.matrix))

    def regressed(self, weight: FloatArray, chosen: Indices) -> Float64Array:
        """Solve the normal equations of the chosen columns."""
        inner = self.matrix[np.ix_(chosen, chosen)]
        damped = inner + _ridge(np.diag(inner)) * np.eye(len(chosen))
        others = _others(weight, chosen) @ self.matrix[:, chosen]
        return np.asarray(np.linalg.solve(damped, others.T).T + weight[:, chosen])


class RowMoment(Moment):
    """The rows X of which it is X^T X."""

    def __init__(self, rows: Float64Array) -> None:
        self.rows = rows

    @property
    def diagonal(self) -> Float64Array:
        """Its diagonal."""
        return np.asarray(np.einsum("nm,nm->m", self.rows, self.rows))

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def row(self, k: int) -> Float64Array:
        """One of its rows."""
        return np.asarray(self.rows[:, k] @ self.rows)

    def mapped(self, matrix: Float64Array) -> Float64Array:
        """Return A C."""
        return np.asarray((matrix @ self.rows.T) @ self.rows)

    def root(self) -> Float64Array:
        """Return the rows; of many, random combinations as above."""
        wide = self.rows.shape[1] > _EXACT_WIDTH and len(self.rows) > _SKETCH_ROWS
        return _sketch(self.rows) if wide else self.rows

    def trace_of_product(self, roots: Moment) -> float:
        """Sum of squares of all products of a row of either."""
        assert isinstance(roots, RowMoment)
        return float(np.square(roots.rows @ self.rows.T).sum())

    def regressed(self, weight: FloatArray, chosen: Indices) -> Float64Array:
        """Solve the dual of the normal equations, which is as large as there are rows."""
        picked = self.rows[:, chosen]
        gram = picked @ picked.T
        gram[np.diag_indices(len(gram))] += _ridge(np.square(picked).sum(axis=0))
        others = _others(weight, chosen) @ self.rows.T
        return np.asarray(np.linalg.solve(gram, others.T).T @ picked + weight[:, chosen])


def _others(weight: FloatArray, chosen: Indices) -> Float64Array:
    others = np.array(weight, dtype=np.float64)
    others[:, chosen] = 0.0
    return others


def _ridge(variances: Float64Array) -> float:
    return _RIDGE * max(float(variances.sum()) / max(1, len(variances)), 1e-30)


def _sketch(rows: Float64Array) -> Float64Array:
    mix = np.random.default_rng(0).standard_normal((_SKETCH_ROWS, len(rows)))
    return np.asarray(mix @ rows / np.sqrt(_SKETCH_ROWS))
