"""The DMT paper's way of forming towers, to compare with: points in the plane, balanced k-means.

Letters: F features, T towers.

Source: the DMT paper, "Tower Partitioner".
"""

from __future__ import annotations

from typing import Final

import numpy as np

from dmt_convert.arrays import Float64Array, IntArray

_STEPS: Final = 300
_LEARNING_RATE: Final = 0.02
_ALL_PAIRS: Final = 256
"""Features up to which every step of Adam looks at all pairs."""
_PAIRS_PER_STEP: Final = 1 << 16
_POWER_STEPS: Final = 20
_ITERATIONS: Final = 15
_TINY: Final = 1e-12


def cluster_in_plane(
    distance: Float64Array, towers: int, *, starts: int, rng: np.random.Generator
) -> list[IntArray]:
    """Embed features in the plane and cluster them into towers of equal size (within one).

    Args:
        distance: Distances that the points shall have, symmetric, shape (F, F).
        towers: T.
        starts: Number of runs of k-means on the same points.
        rng: The only source of randomness.

    Returns:
        Tower of every feature for every run, shape (F,) each.
    """
    points = embed_features(distance, rng=rng)
    return [_balanced_kmeans(points, towers, rng) for _ in range(starts)]


def embed_features(distance: Float64Array, *, rng: np.random.Generator) -> Float64Array:
    """Find points in the plane by Adam on the stress, the sum of (||x_i - x_j|| - distance_ij)^2.

    Adam starts at classical scaling; from random points it ends in worse minima.

    Returns:
        Points, shape (F, 2).
    """
    count = len(distance)
    points = _scale_classically(distance, rng)
    first, second = np.zeros_like(points), np.zeros_like(points)
    i, j = np.triu_indices(count, 1)
    for step in range(1, _STEPS + 1):
        if count > _ALL_PAIRS:
            i = rng.integers(count, size=_PAIRS_PER_STEP)
            j = (i + rng.integers(1, count, size=_PAIRS_PER_STEP)) % count
        away = points[i] - points[j]
        norms = np.maximum(np.sqrt((away * away).sum(axis=1)), _TINY)
        force = (2 * (norms - distance[i, j]) / norms)[:, None] * away
        gradient = np.stack(
            [np.bincount(i, f, count) - np.bincount(j, f, count) for f in force.T], axis=1
        )
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient * gradient - second)
        rate = _LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / _STEPS))
        corrected = np.sqrt(second / (1 - 0.99**step)) + 1e-8
        points = points - rate * first / (1 - 0.9**step) / corrected
    return points


def _scale_classically(distance: Float64Array, rng: np.random.Generator) -> Float64Array:
    """The two leading eigenvectors of the doubly centred squared distances, by power iteration."""
    squares = distance.astype(np.float32) ** 2

    def image_of(basis: Float64Array) -> Float64Array:
        centred = (basis - basis.mean(axis=0)).astype(np.float32)
        image = -0.5 * (squares @ centred).astype(np.float64)
        return np.asarray(image - image.mean(axis=0))

    basis = rng.standard_normal((len(distance), 6))
    for _ in range(_POWER_STEPS):
        basis, _ = np.linalg.qr(image_of(basis) + 1e-9 * basis)
    small = basis.T @ image_of(basis)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    points = basis @ vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0))
    return np.asarray(points + 1e-3 * rng.standard_normal(points.shape))


def _balanced_kmeans(points: Float64Array, towers: int, rng: np.random.Generator) -> IntArray:
    means = np.zeros((towers, 2))
    nearest = np.ones(len(points))
    for t in range(towers):
        weights = nearest if nearest.sum() > 0 else np.ones(len(points))
        means[t] = points[rng.choice(len(points), p=weights / weights.sum())]
        away = ((points - means[t]) ** 2).sum(axis=1)
        nearest = away if t == 0 else np.minimum(nearest, away)
    assignment = np.full(len(points), -1)
    for _ in range(_ITERATIONS):
        before = assignment
        cost_TF = ((means[:, None] - points) ** 2).sum(axis=2)
        assignment = _assign_balanced(cost_TF)
        if (assignment == before).all():
            break
        means = np.stack([points[assignment == t].mean(axis=0) for t in range(towers)])
    return assignment


def _assign_balanced(cost_TF: Float64Array) -> IntArray:
    """Fill towers by regret, then swap pairs of features as long as that lowers the cost."""
    towers, features = cost_TF.shape
    room = np.full(towers, features // towers)
    room[: features % towers] += 1
    assignment = np.full(features, -1)
    waiting = np.arange(features)
    while len(waiting):
        cost = np.where(room[:, None] > 0, cost_TF[:, waiting], np.inf)
        best = cost.argmin(axis=0)
        lowest = np.take_along_axis(cost, best[None], axis=0)[0]
        np.put_along_axis(cost, best[None], np.inf, axis=0)
        second = cost.min(axis=0) if (room > 0).sum() > 1 else lowest
        order = np.argsort(lowest - second, kind="stable")
        # All tower by tower, but no more than its room: who finds it full waits.
        taken = np.concatenate([order[best[order] == t][: room[t]] for t in range(towers)])
        assignment[waiting[taken]] = best[taken]
        room -= np.bincount(best[taken], minlength=towers)
        waiting = np.delete(waiting, taken)
    indices = np.arange(features)
    for _ in range(3):
        swapped = False
        for f in range(features):
            own = cost_TF[assignment, indices]
            gains = own[f] - cost_TF[assignment, f] + own - cost_TF[assignment[f]]
            other = int(gains.argmax())
            if gains[other] > 1e-9:
                assignment[[f, other]] = assignment[[other, f]]
                swapped = True
        if not swapped:
            break
    return assignment
