"""Closed form for dot interaction: projections that keep the dot products.

Letters: n rows, V vectors that are paired (the dense one first), N embedding dim, D output dim,
c and p as in DESIGN section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_ITERATIONS = 30


def second_moments(vectors: npt.NDArray[np.float32]) -> Array:
    """Second moments of every vector: (n, V, N) to (V, N, N)."""
    count, width, dim = vectors.shape
    moments = np.empty((width, dim, dim))
    for i in range(width):
        x = vectors[:, i].astype(np.float64)
        moments[i] = x.T @ x / max(1, count)
    return moments


def fit_projections(moments: Array, importance: Array, widths: Sequence[int]) -> Array:
    """Find projections P_i that keep the dot products of all pairs that matter.

    Minimises sum_ij w_ij E[(e_i^T (I - P_i P_j^T) e_j)^2] for independent e_i, e_j by
    alternating least squares: given all others, P_i = (sum_j w_ij C_j P_j)
    (sum_j w_ij P_j^T C_j P_j)^-1. Starts from one shared P, the leading eigenvectors of
    sum_i w_i C_i, and keeps the best of all rounds, so it is never worse than the shared P.

    Args:
        moments: C_i = E[e_i e_i^T], shape (V, N, N).
        importance: w_ij >= 0, symmetric with zero diagonal, shape (V, V).
        widths: Columns of every P_i, at most N. A narrower vector meets the leading coordinates
            of a wider one.

    Returns:
        P, shape (V, N, largest width), zero beyond a vector's own width.
    """
    count, dim, _ = moments.shape
    width = max(widths)
    if min(widths) >= dim:
        return np.repeat(np.eye(dim)[None], count, axis=0)
    shared = shared_projection(moments, importance)[:, :width]
    own = np.arange(width) < np.asarray(widths)[:, None]
    current = np.where(own[:, None, :], shared, 0.0)
    best, best_loss = current.copy(), pair_loss(moments, importance, current)
    moved = moments @ current  # C_j P_j
    emitted = current.transpose(0, 2, 1) @ moved  # P_j^T C_j P_j
    for _ in range(_ITERATIONS):
        for i in range(count):
            k = widths[i]
            weighted = np.tensordot(importance[i], moved[:, :, :k], axes=1)
            gram = np.tensordot(importance[i], emitted[:, :k, :k], axes=1)
            scale = np.trace(gram) / k
            if scale <= 0:
                continue
            current[i, :, :k] = np.linalg.solve(gram + 1e-9 * scale * np.eye(k), weighted.T).T
            moved[i] = moments[i] @ current[i]
            emitted[i] = current[i].T @ moved[i]
        loss = pair_loss(moments, importance, current)
        if not loss < best_loss:
            break
        done = loss > best_loss * (1 - 1e-4)
        best, best_loss = current.copy(), loss
        if done:
            break
    return _balance(best, moments) if len(set(widths)) == 1 else best


def shared_projection(moments: Array, importance: Array) -> Array:
    """Eigenvectors of sum_i w_i C_i as columns, the leading one first, shape (N, N)."""
    weights = importance.sum(axis=1)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1.0)
    total = np.einsum("i,inm->nm", weights, moments)
    _, vectors = np.linalg.eigh(total)
    leading: Array = vectors[:, ::-1]
    return leading


def pair_loss(moments: Array, importance: Array, projections: Array) -> float:
    """Sum of w_ij tr(C_i E_ij C_j E_ij^T) with E_ij = I - P_i P_j^T, without forming E_ij."""
    cp = moments @ projections
    pcp = projections.transpose(0, 2, 1) @ cp
    flat = moments.reshape(len(moments), -1)
    full = np.sum(importance * (flat @ flat.T))
    # tr(C_i P_i P_j^T C_j): <P_i-weighted moments> contracted pairwise
    left = cp.reshape(len(cp), -1)
    mixed = np.sum(importance * (left @ left.T))
    square = pcp.reshape(len(pcp), -1)
    both = np.sum(importance * (square @ square.transpose(1, 0)))
    return float(full - 2 * mixed + both)


def _balance(projections: Array, moments: Array) -> Array:
    """Give the emitted coordinates of all vectors one common scale and orthogonal axes.

    P_i R and P_j R^-T give the same dot products for any R; an orthogonal R that diagonalises
    the mean moment of what is emitted keeps them and leaves well-conditioned inputs.
    """
    emitted = np.einsum("ind,inm,ime->de", projections, moments, projections, optimize=True)
    _, axes = np.linalg.eigh(emitted)
    balanced: Array = projections @ axes[:, ::-1]
    return balanced


def fit_combinations(
    pair_weights: Array, norms: Array, members: npt.NDArray[np.intp], p: int
) -> Array:
    """Choose p combinations of a tower's features that keep most of what over_arch reads.

    over_arch's first layer reads sum_fg W_hfg <e_f, e_g>. For one tower, W unfolds into a
    matrix (its features) x (everything else); its leading left singular vectors (with features
    scaled by their norms) are the combinations sum_f a_mf e_f that lose least.

    Args:
        pair_weights: W, symmetric in its last two axes, shape (H, V, V).
        norms: Root mean square norm of every vector, shape (V,).
        members: Indices of the tower's features among the V vectors.
        p: How many combinations.

    Returns:
        a, shape (p, V), zero outside the tower; rows beyond the tower's rank are zero.
    """
    scaled = pair_weights[:, members, :] * norms[members, None] * norms
    unfolded = scaled.transpose(1, 0, 2).reshape(len(members), -1)
    left, _, _ = np.linalg.svd(unfolded @ unfolded.T)
    combos = np.zeros((p, pair_weights.shape[1]))
    take = min(p, len(members))
    safe = np.where(norms[members] > 0, norms[members], 1.0)
    combos[:take, members] = left[:, :take].T / safe * np.mean(safe)
    return combos
