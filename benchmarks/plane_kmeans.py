"""Features as points whose distances resemble given distances.

Letters: F features, d dimensions of the points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[np.floating]

_FULL_BATCH_FEATURES: Final = 256
_STEPS: Final = 300
_PAIRS_PER_STEP: Final = 1 << 16
_LEARNING_RATE: Final = 0.02
_TINY: Final = 1e-12


def measure_stress(points: AnyFloats, distance: AnyFloats) -> float:
    """Sum over pairs i < j of (||x_i - x_j|| - distance_ij)^2.

    Args:
        points: Points, shape (F, d).
        distance: Wanted distances, symmetric, shape (F, F).

    Source: the DMT paper, "Tower Partitioner".
    """
    return float(np.triu((_pairwise(points) - distance) ** 2, 1).sum())


def stress_gradient(points: AnyFloats, distance: AnyFloats) -> FloatArray:
    """Gradient of `measure_stress` with respect to the points, shape (F, d).

    Where two points coincide the stress has a kink; that pair then counts as 0.
    """
    norms = _pairwise(points)
    pull = np.where(norms > _TINY, 2 * (norms - distance) / np.maximum(norms, _TINY), 0)
    gradient: FloatArray = pull.sum(axis=1)[:, None] * points - pull @ points
    return gradient


def embed_features(
    distance: AnyFloats, *, rng: np.random.Generator, dimensions: int = 2
) -> FloatArray:
    """Find points whose distances resemble the given ones, by Adam on the stress.

    Adam starts at classical scaling (the leading eigenvectors of the doubly centred squared
    distances, by a few subspace iterations, scaled to the least stress): from random points
    the non-convex stress ends in worse minima and takes more steps. Beyond a few hundred
    features every step looks at a random batch of pairs.

    Args:
        distance: Wanted distances, symmetric, zero diagonal, shape (F, F).
        rng: Source of everything random.
        dimensions: d.

    Returns:
        Points centred on the origin, shape (F, d).

    Source: the DMT paper, "Tower Partitioner".
    """
    points = _scale_classically(distance, rng, dimensions)
    if len(points) > 1:
        batch = None if len(points) <= _FULL_BATCH_FEATURES else _PAIRS_PER_STEP
        points = _run_adam(
            points,
            lambda x: (
                stress_gradient(x, distance)
                if batch is None
                else _sample_gradient(x, distance, rng, batch)
            ),
        )
    return np.asarray(points - points.mean(axis=0))


def _run_adam(points: FloatArray, gradient_at: Callable[[FloatArray], FloatArray]) -> FloatArray:
    first, second = np.zeros_like(points), np.zeros_like(points)
    for step in range(1, _STEPS + 1):
        gradient = gradient_at(points)
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient * gradient - second)
        rate = _LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / _STEPS))
        corrected = np.sqrt(second / (1 - 0.99**step)) + 1e-8
        points = points - rate * first / (1 - 0.9**step) / corrected
    return points


def _sample_gradient(
    points: FloatArray, distance: AnyFloats, rng: np.random.Generator, pairs: int
) -> FloatArray:
    count = len(points)
    i = rng.integers(count, size=pairs)
    j = (i + rng.integers(1, count, size=pairs)) % count
    apart = points[i] - points[j]
    norms = np.sqrt((apart * apart).sum(axis=1))
    pull = np.where(norms > _TINY, 2 * (norms - distance[i, j]) / np.maximum(norms, _TINY), 0)
    force = pull[:, None] * apart
    return np.stack(
        [
            np.bincount(i, column, minlength=count) - np.bincount(j, column, minlength=count)
            for column in force.T
        ],
        axis=1,
    )


def _scale_classically(
    distance: AnyFloats, rng: np.random.Generator, dimensions: int
) -> FloatArray:
    count = len(distance)
    squares = np.asarray(distance, dtype=np.float32) ** 2
    means = squares.mean(axis=0)
    basis = rng.standard_normal((count, dimensions + 4))
    for _ in range(20):
        # -1/2 J S J X with J the centring matrix; J S J is never formed.
        centred = basis - basis.mean(axis=0)
        image = -0.5 * (squares @ centred.astype(np.float32)).astype(np.float64)
        image -= image.mean(axis=0)
        basis, _ = np.linalg.qr(image + 1e-9 * basis)
    centred = basis - basis.mean(axis=0)
    small = -0.5 * centred.T @ (squares @ centred.astype(np.float32)).astype(np.float64)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(values)[::-1][:dimensions]
    points = np.zeros((count, dimensions))
    points[:, : len(order)] = centred @ vectors[:, order] * np.sqrt(np.maximum(values[order], 0))
    points += 1e-3 * float(np.sqrt(means.mean())) * rng.standard_normal(points.shape)
    norms = _pairwise(points[:2048])
    scale = float((norms * distance[:2048, :2048]).sum() / max(float((norms**2).sum()), _TINY))
    return np.asarray(points * scale, dtype=np.float64)


def _pairwise(points: AnyFloats) -> FloatArray:
    squares = np.zeros((len(points), len(points)))
    for column in points.T:
        squares += (column[:, None] - column[None, :]) ** 2
    return np.asarray(np.sqrt(squares))
