"""Affinities of features, random and planted, and samples that have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plant_samples(
    truth: Sequence[int], *, rows: int = 64, dim: int = 16, noise: float = 1.5, seed: int = 0
) -> list[np.ndarray]:
    """Pooled embeddings that share a direction per row with the features of their group."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(truth) + 1, rows, dim))
    return [
        (centres[t] + noise * rng.standard_normal((rows, dim))).astype(np.float32) for t in truth
    ]


def random_affinity(count: int, seed: int = 0) -> np.ndarray:
    """A symmetric matrix in [0, 1] with diagonal 1."""
    matrix = np.random.default_rng(seed).random((count, count)).astype(np.float32)
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


def planted_affinity(count: int, blocks: int) -> np.ndarray:
    """Affinity that is high among every `blocks`-th feature."""
    rng = np.random.default_rng(0)
    noise = rng.random((count, count)) * 0.3
    block = np.arange(count) % blocks
    matrix = (noise + noise.T) / 2 + 0.5 * (block[:, None] == block[None, :])
    np.fill_diagonal(matrix, 1)
    return matrix.astype(np.float32)
