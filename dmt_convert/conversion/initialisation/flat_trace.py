"""What the flat model computes on sampled rows: the material of every closed form.

Letters: n rows, N embedding dim, M widths' sum of pooled embeddings, H first layer's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dmt_convert.conversion import Sample
from dmt_convert.model import FlatModel, to_tensor
from dmt_convert.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
_BATCH = 256  # what autograd keeps of a batch is many times its inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTrace:
    """Intermediate results of the flat model, row by row, and its weights."""

    spec: ModelSpec
    """The flat model."""
    weights: dict[str, FloatArray]
    """Its dense weights by canonical name."""
    dense: FloatArray
    """Output of dense_arch, shape (n, N)."""
    pooled: FloatArray
    """Pooled embeddings in feature order, shape (n, M)."""
    pre_activation: FloatArray
    """First over_arch layer before its ReLU, shape (n, H); a network's logit, shape (n, 1)."""
    pooled_gradient: FloatArray
    """Gradient of the logit by the pooled embeddings, shape (n, M)."""
    logits: FloatArray
    """The logits, shape (n,)."""
    interaction_gradient: Array
    """Mean square gradient of the logit by every input of over_arch, shape (width,)."""

    @property
    def inputs(self) -> FloatArray:
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
    squares: Array | float = 0.0
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
        spec=model.spec,
        weights=dense_weights(model),
        dense=out_dense,
        pooled=sample.pooled,
        pre_activation=out_pre,
        pooled_gradient=out_gradient,
        logits=out_logits,
        interaction_gradient=np.asarray(squares, dtype=np.float64) / max(1, rows),
    )


def dense_weights(model: torch.nn.Module) -> dict[str, FloatArray]:
    """Return a model's weights outside tables and towers, by canonical name."""
    return {
        name.removeprefix("interaction."): value.detach().numpy()
        for name, value in model.state_dict().items()
        if not name.startswith(("tables.", "towers."))
    }
