"""From a batch of bags to TorchRec's jagged tensors.

Letters: B samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.arrays import Float32Array
from dmt_convert.data import Bag, Batch
from dmt_convert.model import to_tensor
from dmt_convert.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JaggedBatch:
    """B rows of input on a rank's device."""

    dense: Tensor
    """Dense inputs, shape (B, D), float32."""
    sparse: KeyedJaggedTensor
    """Ids of all features."""
    labels: Tensor | None
    """0 or 1 per row, shape (B,), float32."""


def carries_weights(spec: ModelSpec) -> bool:
    """Whether ids travel with weights whatever the data holds: a mean is a weighted sum.

    TorchRec has one pooling per table and divides where the samples end up; a weight of one over
    the bag's length works wherever the table's rows lie.
    """
    return any(feature.pooling == "mean" for feature in spec.features)


def to_jagged(
    batch: Batch, spec: ModelSpec, device: torch.device, *, weighted: bool
) -> JaggedBatch:
    """Put a batch on a device.

    Args:
        batch: Bags of the model's features, in its order.
        spec: The flat model.
        device: Where.
        weighted: Whether ids travel with weights; 1 where the data has none.
    """
    lengths = [np.diff(bag.offsets).astype(np.int32) for bag in batch.bags]
    weights = None
    if weighted:
        parts = [
            _weights(bag, count, mean=feature.pooling == "mean")
            for bag, count, feature in zip(batch.bags, lengths, spec.features, strict=True)
        ]
        weights = torch.from_numpy(np.concatenate(parts)).to(device)
    sparse = KeyedJaggedTensor(
        keys=list(batch.feature_names),
        values=torch.from_numpy(np.concatenate([bag.values for bag in batch.bags])).to(device),
        lengths=torch.from_numpy(np.concatenate(lengths)).to(device),
        weights=weights,
        stride=batch.num_rows,
    )
    labels = None if batch.labels is None else to_tensor(batch.labels).to(device)
    return JaggedBatch(dense=to_tensor(batch.dense).to(device), sparse=sparse, labels=labels)


def _weights(bag: Bag, lengths: npt.NDArray[np.int32], *, mean: bool) -> Float32Array:
    given = np.ones(len(bag.values), dtype=np.float32) if bag.weights is None else bag.weights
    if not mean:
        return given
    divided: Float32Array = (given / np.repeat(lengths, lengths)).astype(np.float32)
    return divided
