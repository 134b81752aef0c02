"""Pooled lookups: from bags of ids to one vector per feature, from disk or from memory.

Letters: B batch, N embedding dim, U rows that a batch touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dmt_convert.checkpoint import TensorInfo, gather_rows
from dmt_convert.data import Bag
from dmt_convert.errors import CheckpointError
from dmt_convert.model.table_codes import RowCode, recode_rows
from dmt_convert.spec import Dtype, FeatureSpec, ModelSpec

_TORCH_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def to_tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """Share an array's memory, or copy it if it is read-only (torch has no read-only tensors)."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def pool_bag(weight: Tensor, bag: Bag, feature: FeatureSpec) -> Tensor:
    """Pool the rows of one bag per sample.

    Args:
        weight: The table, or the part of it that the ids index, shape (rows, N).
        bag: Ids, offsets and weights.
        feature: Says sum or mean.

    Returns:
        Pooled embeddings, shape (B, N); zeros for an empty bag.
    """
    values = to_tensor(bag.values)
    offsets = to_tensor(bag.offsets)
    if bag.weights is None:
        return nn.functional.embedding_bag(
            values, weight, offsets, mode=feature.pooling, include_last_offset=True
        )
    pooled = nn.functional.embedding_bag(
        values,
        weight,
        offsets,
        mode="sum",
        per_sample_weights=to_tensor(bag.weights).to(weight.dtype),
        include_last_offset=True,
    )
    if feature.pooling == "mean":
        lengths = torch.from_numpy(np.diff(bag.offsets)).clamp(min=1)
        pooled = pooled / lengths.unsqueeze(1)
    return pooled


class MappedTables(nn.Module):
    """Looks rows up on disk: a batch costs the rows it touches, whatever the tables' size.

    Args:
        spec: The model.
        infos: Table -> its tensor in the file.
        stored_as: Round rows to this type, as a bundle would that stores them so.
        code: Code rows and decode them again, as an export would that stores them so.
    """

    def __init__(
        self,
        spec: ModelSpec,
        infos: Mapping[str, TensorInfo],
        *,
        stored_as: Dtype | None = None,
        code: RowCode | None = None,
    ) -> None:
        super().__init__()
        self._code = code
        self._rounded = None if stored_as is None else _TORCH_DTYPES[stored_as]
        self._features = {feature.name: feature for feature in spec.features}
        self._infos = infos

    def forward(self, feature: str, bag: Bag) -> Tensor:
        """Return the pooled embeddings of a feature, shape (B, N), float32.

        Raises:
            CheckpointError: A row that is touched holds NaN or Inf.
            ExportError: The code does not take a row that is touched.
        """
        spec = self._features[feature]
        info = self._infos[spec.table]
        rows, inverse = np.unique(bag.values, return_inverse=True)
        gathered = gather_rows(info, rows)
        if not np.isfinite(gathered).all():
            bad = int(rows[np.flatnonzero(~np.isfinite(gathered).all(axis=1))[0]])
            raise CheckpointError(
                f"table {spec.table!r} holds NaN or Inf in row {bad}",
                expected="finite weights",
                hint="the training diverged or the file is damaged; use another checkpoint",
            )
        if self._code is not None:
            gathered = recode_rows(
                gathered, self._code, lambda i: f"row {rows[i]} of table {spec.table!r}"
            )
        local = Bag(values=inverse.astype(np.int64), offsets=bag.offsets, weights=bag.weights)
        rows_UN = to_tensor(gathered)
        if self._rounded is not None:
            rows_UN = rows_UN.to(self._rounded).float()
        return pool_bag(rows_UN, local, spec)


class TrainableTables(nn.ModuleDict):
    """Tables in memory, as `nn.EmbeddingBag` weights that can be trained.

    Args:
        spec: The model.
        features: The features to serve; all by default.
        device: Where the tables live.
    """

    def __init__(
        self,
        spec: ModelSpec,
        features: tuple[str, ...] | None = None,
        device: torch.device | None = None,
    ) -> None:
        wanted = spec.feature_names if features is None else features
        self_features = {f.name: f for f in spec.features if f.name in wanted}
        tables = {feature.table for feature in self_features.values()}
        super().__init__(
            {
                table.name: nn.EmbeddingBag(
                    table.rows,
                    table.dim,
                    mode="sum",
                    include_last_offset=True,
                    device=device,
                    _weight=torch.empty(table.rows, table.dim, device=device).uniform_(
                        -(table.rows**-0.5), table.rows**-0.5
                    ),
                )
                for table in spec.tables
                if table.name in tables
            }
        )
        self._features = self_features

    def forward(self, feature: str, bag: Bag) -> Tensor:
        """Return the pooled embeddings of a feature, shape (B, N)."""
        spec = self._features[feature]
        table = self[spec.table]
        assert isinstance(table, nn.EmbeddingBag)
        return pool_bag(table.weight, bag, spec)
