"""Closed form for DCNv2: which coordinates a tower emits.

The cross layers multiply coordinate k of the input with coordinate k of a linear map, so a
rotation of the embeddings would break them: a tower emits chosen coordinates as they are, and
the others are rebuilt from those by regression. What is chosen is what the logit feels.

Letters: M_t widths' sum of a tower, k coordinates chosen.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_EXACT_WIDTH: Final = 1024
_SKETCH_ROWS: Final = 256

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def choose_coordinates(covariance: Array, sensitivity: Array, count: int) -> Indices:
    """Choose coordinates greedily so that the logit loses least when the rest is regressed.

    The loss of a choice S is tr(G R_S), where R_S is the covariance left after regression on
    the coordinates in S, and G = E[g g^T] the second moment of the logit's gradient. Each step
    takes the coordinate with the largest reduction |G^(1/2) R_k|^2 / R_kk (column subset
    selection by pivoted elimination).

    Args:
        covariance: Of the tower's embeddings, shape (M_t, M_t).
        sensitivity: G, shape (M_t, M_t).
        count: k.

    Returns:
        Sorted indices, shape (k,); once nothing is left to explain, the first free ones.
    """
    chosen, _ = _choose_greedily(covariance, sensitivity, count)
    free = np.ones(len(covariance), dtype=bool)
    free[chosen] = False
    rest = [int(i) for i in np.flatnonzero(free)[: count - len(chosen)]]
    return np.sort(np.array(chosen + rest, dtype=np.intp))


def coordinate_losses(vectors: npt.NDArray[np.float32], gradient: npt.NDArray[np.float32]) -> Array:
    """What the logit loses by 0, 1, ..., M_t coordinates, chosen as above.

    Args:
        vectors: The tower's embeddings on sampled rows, shape (n, M_t).
        gradient: Gradient of the logit by them, shape (n, M_t).

    Returns:
        tr(G R_S) for every number of coordinates, shape (M_t + 1,).
    """
    covariance, sensitivity = tower_moments(vectors, gradient)
    _, gains = _choose_greedily(covariance, sensitivity, len(covariance))
    total = float(np.sum(sensitivity * covariance))
    losses = np.zeros(len(covariance) + 1)
    losses[: len(gains) + 1] = np.maximum(total - np.cumsum([0.0, *gains]), 0.0)
    return losses


def tower_moments(
    vectors: npt.NDArray[np.float32], gradient: npt.NDArray[np.float32]
) -> tuple[Array, Array]:
    """Covariance of a tower's embeddings, and G, each of shape (M_t, M_t)."""
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    felt = gradient.astype(np.float64)
    return centred.T @ centred / len(vectors), felt.T @ felt / len(vectors)


def _choose_greedily(
    covariance: Array, sensitivity: Array, count: int
) -> tuple[list[int], list[float]]:
    """Coordinates in the order of choice, and by how much each lowers the loss."""
    root = _square_root(sensitivity) @ covariance
    diagonal = np.diag(covariance).astype(np.float64)
    factors = np.empty((count, len(covariance)))  # covariance - factors^T factors is what is left
    floor = 1e-10 * max(float(diagonal.max(initial=0.0)), 1e-30)
    chosen: list[int] = []
    gains: list[float] = []
    free = np.ones(len(covariance), dtype=bool)
    for step in range(count):
        usable = free & (diagonal > floor)
        if not usable.any():
            break
        gain = np.where(usable, np.square(root).sum(axis=0), -1.0)
        gain = np.where(usable, gain / np.where(usable, diagonal, 1.0), -1.0)
        k = int(np.argmax(gain))
        chosen.append(k)
        gains.append(float(gain[k]))
        free[k] = False
        scale = float(np.sqrt(diagonal[k]))
        factors[step] = (covariance[k] - factors[:step, k] @ factors[:step]) / scale
        root -= np.outer(root[:, k] / scale, factors[step])
        diagonal = diagonal - np.square(factors[step])
    return chosen, gains


def _square_root(sensitivity: Array) -> Array:
    """Return A with A^T A = G, shape (rank, M_t); for wide towers A^T A only estimates G.

    Beyond 1,024 coordinates the eigenvectors take longer than all else; 256 random combinations
    of the rows of a Cholesky factor keep every gain to within some per cent.
    """
    width = len(sensitivity)
    if width <= _EXACT_WIDTH:
        values, axes = np.linalg.eigh(sensitivity)
        keep = values > max(float(values.max(initial=0.0)), 0.0) * 1e-6
        exact: Array = (axes[:, keep] * np.sqrt(values[keep])).T
        return exact
    damping = 1e-9 * max(float(np.trace(sensitivity)) / width, 1e-30)
    factor = np.linalg.cholesky(sensitivity + damping * np.eye(width))
    mix = np.random.default_rng(0).standard_normal((_SKETCH_ROWS, width))
    sketch: Array = mix @ factor.T / np.sqrt(_SKETCH_ROWS)
    return sketch


def rebuild(covariance: Array, chosen: Indices) -> Array:
    """Regress all coordinates on the chosen ones.

    Returns:
        B with x - mean ~ B (x_chosen - mean), shape (M_t, k); chosen rows are unit vectors.
    """
    inner = covariance[np.ix_(chosen, chosen)]
    ridge = 1e-6 * max(float(np.trace(inner)) / max(1, len(chosen)), 1e-30)
    solution = np.linalg.solve(inner + ridge * np.eye(len(chosen)), covariance[chosen])
    back: Array = np.array(solution.T, dtype=np.float64)
    back[chosen] = np.eye(len(chosen))
    return back
