"""The stress, its gradient, and what Adam makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from dmt_convert.conversion.partition import embedding
from dmt_convert.conversion.partition.embedding import (
    embed_features,
    measure_stress,
    stress_gradient,
)
from support.affinities import random_affinity


def _distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_gradient_agrees_with_finite_differences():
    distance = 1 - random_affinity(7).astype(np.float64)
    points = np.random.default_rng(0).standard_normal((7, 3))
    gradient = stress_gradient(points, distance)
    step = 1e-6
    for index in np.ndindex(points.shape):
        up, down = points.copy(), points.copy()
        up[index] += step
        down[index] -= step
        slope = (measure_stress(up, distance) - measure_stress(down, distance)) / (2 * step)
        assert abs(slope - gradient[index]) < 1e-6


def test_sampled_gradient_points_the_same_way():
    distance = 1 - random_affinity(40).astype(np.float64)
    points = np.random.default_rng(0).standard_normal((40, 2))
    rng = np.random.default_rng(1)
    sampled = embedding._sample_gradient(points, distance, rng, 200_000)
    # i and j are drawn in both orders: every pair is seen pairs / (F (F - 1) / 2) times.
    expected = stress_gradient(points, distance) * 200_000 / (40 * 39 / 2)
    np.testing.assert_allclose(sampled, expected, rtol=0.1, atol=0.02 * abs(expected).max())


@pytest.mark.parametrize("count", [30, 400])
def test_distances_of_points_in_the_plane_are_recovered(count):
    truth = np.random.default_rng(0).random((count, 2))
    points = embed_features(_distances(truth), rng=np.random.default_rng(1))
    assert np.abs(_distances(points) - _distances(truth)).max() < 0.02


def test_adam_lowers_the_stress_of_classical_scaling():
    distance = 1 - random_affinity(50).astype(np.float64)
    start = embedding._scale_classically(distance, np.random.default_rng(0), 2)
    end = embed_features(distance, rng=np.random.default_rng(0))
    assert measure_stress(end, distance) < 0.9 * measure_stress(start, distance)
    slopes = [np.abs(stress_gradient(x, distance)).max() for x in (end, start)]
    assert slopes[0] < 0.05 * slopes[1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_features(count):
    distance = np.ones((count, count)) - np.eye(count)
    points = embed_features(distance, rng=np.random.default_rng(0))
    assert points.shape == (count, 2)
    np.testing.assert_allclose(_distances(points), distance, atol=1e-2)


def test_all_distances_zero():
    points = embed_features(np.zeros((5, 5)), rng=np.random.default_rng(0))
    assert np.isfinite(points).all()


def test_more_dimensions_fit_better():
    distance = 1 - random_affinity(30).astype(np.float64)
    flat, deep = (
        embed_features(distance, rng=np.random.default_rng(0), dimensions=d) for d in (2, 5)
    )
    assert deep.shape == (30, 5)
    assert measure_stress(deep, distance) < measure_stress(flat, distance)
