"""What the flat model computes on sampled rows: the material of every closed form.

Letters: n rows, D dense inputs, N width of the dense vector, M width of all pooled embeddings, M_t
of those of a tower, H outputs of the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dmt_convert.arrays import Float32Array, Float64Array
from dmt_convert.conversion import Sample
from dmt_convert.model import FlatModel, to_tensor
from dmt_convert.spec import ModelSpec

_BATCH = 256  # what autograd keeps of a batch is many times its inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTrace:
    """Intermediate results of the flat model, row by row, and its weights."""

    model: FlatModel
    """The flat model."""
    dense_inputs: Float32Array
    """Dense inputs, shape (n, D)."""
    weights: dict[str, Float32Array]
    """Its dense weights by canonical name."""
    dense: Float32Array
    """Output of dense_arch, shape (n, N)."""
    pooled: Float32Array
    """Pooled embeddings in feature order, shape (n, M)."""
    pre_activation: Float32Array
    """First over_arch layer before its ReLU, shape (n, H); a network's logit, shape (n, 1)."""
    pooled_gradient: Float32Array
    """Gradient of the logit by the pooled embeddings, shape (n, M)."""
    logits: Float32Array
    """The logits, shape (n,)."""
    interaction_gradient: Float64Array
    """Mean square gradient of the logit by every input of over_arch, shape (width,)."""

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec."""
        return self.model.spec

    @property
    def inputs(self) -> Float32Array:
        """The interaction's inputs side by side, the dense vector first, shape (n, N + M)."""
        return np.concatenate([self.dense, self.pooled], axis=1)


def trace_flat(model: FlatModel, sample: Sample) -> FlatTrace:
    """Run the flat model forward and backward on sampled rows.

    Args:
        model: The flat model.
        sample: Rows with their pooled embeddings.
    """
    rows = sample.batch.num_rows
    out_dense = np.empty((rows, model.spec.input_dims[0]), dtype=np.float32)
    out_pre = np.empty((rows, model.spec.over_arch.widths[:2][-1]), dtype=np.float32)
    out_gradient = np.empty_like(sample.pooled)
    out_logits = np.empty(rows, dtype=np.float32)
    squares: Float64Array | float = 0.0
    for begin in range(0, rows, _BATCH):
        chosen = slice(begin, begin + _BATCH)
        pooled = to_tensor(sample.pooled[chosen]).clone().requires_grad_(True)
        with torch.enable_grad():
            dense = model.dense_arch(to_tensor(sample.batch.dense[chosen]))
            interacted = model.interaction(dense, pooled, dense)
            pre = model.over_arch[0](interacted) if len(model.over_arch) else interacted
            logits = model.over_arch(interacted).squeeze(1)
            by_pooled, by_interacted = torch.autograd.grad(logits.sum(), (pooled, interacted))
        out_logits[chosen] = logits.detach().numpy()
        out_dense[chosen] = dense.detach().numpy()
        out_pre[chosen] = pre.detach().numpy()
        out_gradient[chosen] = by_pooled.numpy()
        squares = squares + by_interacted.double().square().sum(dim=0).numpy()
    return FlatTrace(
        model=model,
        dense_inputs=sample.batch.dense,
        weights=dense_weights(model),
        dense=out_dense,
        pooled=sample.pooled,
        pre_activation=out_pre,
        pooled_gradient=out_gradient,
        logits=out_logits,
        interaction_gradient=np.asarray(squares, dtype=np.float64) / max(1, rows),
    )


def dense_weights(model: torch.nn.Module) -> dict[str, Float32Array]:
    """Return a model's weights outside tables and towers, by canonical name."""
    return {
        name.removeprefix("interaction."): value.detach().numpy()
        for name, value in model.state_dict().items()
        if not name.startswith(("tables.", "towers."))
    }


def tower_moments(
    vectors: Float32Array, gradient: Float32Array
) -> tuple[Float64Array, Float64Array]:
    """Covariance of a tower's embeddings, and G = E[g g^T], each of shape (M_t, M_t).

    Args:
        vectors: The tower's embeddings on sampled rows, shape (n, M_t).
        gradient: g, the gradient of the logit by them, shape (n, M_t).
    """
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    felt = gradient.astype(np.float64)
    return centred.T @ centred / len(vectors), felt.T @ felt / len(vectors)
