"""Closed form for interactions whose first layer is linear in the embeddings (cat, projection).

That layer reads A x; what matters of a feature's embedding e_f is A_f e_f alone. The leading
left singular vectors U of A_f C_f^(1/2) say which combinations of outputs a feature reaches:
emit y = U^T A_f e_f and read it back through U. Exact once the output dim reaches A_f's rank.

Letters: H outputs of the first layer, N embedding dim, k elements emitted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def fit_outputs(block: Array, x: npt.NDArray[np.float32], width: int) -> tuple[Array, Array]:
    """Compress one block of columns of the first layer.

    Args:
        block: A_f, shape (H, N): the layer's columns for this feature (or tower).
        x: Its embeddings on sampled rows, shape (n, N).
        width: k, elements to emit.

    Returns:
        The emitting map (k, N) and the reading map (H, k). Emitted coordinates have unit
        variance where they vary at all; coordinates beyond the block's rank are zero.
    """
    axes, values = _principal_axes(block, x)
    take = min(width, len(values))
    leading, spread = axes[:, :take], values[:take]
    live = spread > 1e-7 * max(float(spread.max(initial=0.0)), 1e-30)
    scale = np.where(live, spread, 1.0)
    emit = np.zeros((width, block.shape[1]))
    read = np.zeros((block.shape[0], width))
    emit[:take] = np.where(live[:, None], leading.T @ block / scale[:, None], 0.0)
    read[:, :take] = np.where(live, leading * scale, 0.0)
    return emit, read


def output_losses(block: Array, x: npt.NDArray[np.float32]) -> Array:
    """Variance of the outputs that 0, 1, ... emitted elements leave out, as `fit_outputs` does.

    Args:
        block: A_f, shape (H, N).
        x: Embeddings on sampled rows, shape (n, N).

    Returns:
        Shape (min(H, N) + 1,), falling to 0.
    """
    _, spread = _principal_axes(block, x)
    return np.append(np.cumsum(np.square(spread)[::-1])[::-1], 0.0)


def _principal_axes(block: Array, x: npt.NDArray[np.float32]) -> tuple[Array, Array]:
    """Principal axes of block x as columns, and the spread along each, largest first.

    By way of whichever covariance is smaller: that of x, or that of the outputs.
    """
    if block.shape[1] < block.shape[0]:
        values, axes = _eigen(x.astype(np.float64))
        left, spread, _ = np.linalg.svd(block @ (axes * np.sqrt(values)), full_matrices=False)
        return left, spread
    values, axes = _eigen(x.astype(np.float64) @ block.T)
    return axes, np.sqrt(values)


def _eigen(samples: Array) -> tuple[Array, Array]:
    """Eigenvalues of the covariance, largest first, and eigenvectors as columns."""
    centred = samples - samples.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred / max(1, len(samples)))
    return np.maximum(values[::-1], 0.0), axes[:, ::-1]
