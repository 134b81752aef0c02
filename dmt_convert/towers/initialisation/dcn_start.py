"""Closed form for DCNv2: which coordinates a tower emits.

The cross layers multiply coordinate k of the input with coordinate k of a linear map, so a
rotation of the embeddings would break them: a tower emits chosen coordinates as they are, and
the others are rebuilt from those by regression. What is chosen is what the logit feels.

Letters: M_t widths' sum of a tower, k coordinates chosen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
    residual = covariance.copy()
    values, axes = np.linalg.eigh(sensitivity)
    keep = values > max(float(values.max(initial=0.0)), 0.0) * 1e-6
    root = (axes[:, keep] * np.sqrt(values[keep])).T @ residual
    floor = 1e-10 * max(float(np.diag(covariance).max(initial=0.0)), 1e-30)
    chosen: list[int] = []
    free = np.ones(len(covariance), dtype=bool)
    for _ in range(count):
        diagonal = np.diag(residual)
        usable = free & (diagonal > floor)
        if not usable.any():
            break
        gain = np.where(usable, np.square(root).sum(axis=0), -1.0)
        gain = np.where(usable, gain / np.where(usable, diagonal, 1.0), -1.0)
        k = int(np.argmax(gain))
        chosen.append(k)
        free[k] = False
        column = residual[:, k].copy()
        root -= np.outer(root[:, k], column) / column[k]
        residual -= np.outer(column, column) / column[k]
    rest = [int(i) for i in np.flatnonzero(free)[: count - len(chosen)]]
    return np.sort(np.array(chosen + rest, dtype=np.intp))


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
