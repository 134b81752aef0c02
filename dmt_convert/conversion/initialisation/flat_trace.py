"""What the flat model computes on sampled rows: the material of every closed form.

Letters: n rows, D dense inputs, N width of the dense vector, M width of all pooled embeddings, M_t
of those of a tower, H outputs of the first layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dmt_convert.arrays import Float32Array, Float64Array
from dmt_convert.conversion import Sample
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.model import FlatModel, to_tensor
from dmt_convert.spec import ModelSpec


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
    pre_gradient: Float32Array
    """Gradient of the logit by `pre_activation`, of its shape."""
    solved: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What closed forms found on this trace that holds for any budget, by what was asked."""

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec."""
        return self.model.spec

    @property
    def inputs(self) -> Float32Array:
        """The interaction's inputs side by side, the dense vector first, shape (n, N + M)."""
        return np.concatenate([self.dense, self.pooled], axis=1)

    def vectors(self) -> Iterator[Float32Array]:
        """Yield the interaction's inputs one by one, the dense vector first: (n, N), (n, N_f)."""
        yield self.dense
        begin = 0
        for dim in self.spec.feature_dims:
            yield self.pooled[:, begin : begin + dim]
            begin += dim


def trace_flat(model: FlatModel, sample: Sample) -> FlatTrace:
    """Run the flat model forward and backward on sampled rows.

    Args:
        model: The flat model.
        sample: Rows with their pooled embeddings.
    """
    rows = sample.batch.num_rows
    out_dense = np.empty((rows, model.spec.input_dims[0]), dtype=np.float32)
    out_pre = np.empty((rows, model.spec.over_arch.widths[:2][-1]), dtype=np.float32)
    out_by_pre = np.empty_like(out_pre)
    out_gradient = np.empty_like(sample.pooled)
    out_logits = np.empty(rows, dtype=np.float32)
    for chosen in row_blocks(model.spec, rows):
        pooled = to_tensor(sample.pooled[chosen]).clone().requires_grad_(True)
        with torch.enable_grad():
            dense = model.dense_arch(to_tensor(sample.batch.dense[chosen]))
            pre = model.pre_activations(dense, pooled)
            logits = model.over_arch.finish(pre).squeeze(1)
            by_pooled, by_pre = torch.autograd.grad(logits.sum(), (pooled, pre))
        out_logits[chosen] = logits.detach().numpy()
        out_dense[chosen] = dense.detach().numpy()
        out_pre[chosen] = pre.detach().numpy()
        out_gradient[chosen], out_by_pre[chosen] = by_pooled.numpy(), by_pre.numpy()
    return FlatTrace(
        model=model,
        dense_inputs=sample.batch.dense,
        weights=dense_weights(model),
        dense=out_dense,
        pooled=sample.pooled,
        pre_activation=out_pre,
        pooled_gradient=out_gradient,
        logits=out_logits,
        pre_gradient=out_by_pre,
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
