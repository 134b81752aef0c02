"""fbgemm's table-batched embedding and TorchRec's quantised module over the shared file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from serving_case import DIM, FEATURES, flat_spec
from torch import Tensor

ROW_ALIGNMENT: Final = 16
"""TorchRec's own default."""
_CODES: Final = {"fp32": SparseType.FP32, "int8": SparseType.INT8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tbe:
    """The inference kernel without its weights, and how it wants them to lie."""

    module: Any
    host_size: int
    """Bytes of all tables."""
    offsets: tuple[int, ...]
    """Where every table begins, in bytes."""
    row_bytes: int
    """Bytes from one row to the next."""

    def share(self, data: Tensor) -> Any:
        """Give it its weights without a copy, and return it."""
        assert data.numel() == self.host_size, (data.numel(), self.host_size)
        self.module.weights_host = data
        self.module.weight_initialized = True
        return self.module


def build_tbe(rows: int, code: str) -> Tbe:
    """Build the kernel over all tables of `rows` rows."""
    spec = flat_spec("dlrm", rows)
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (table.name, table.rows, table.dim, _CODES[code], EmbeddingLocation.HOST)
            for table in spec.tables
        ],
        device=torch.device("cpu"),
        output_dtype=SparseType.FP32,
        row_alignment=ROW_ALIGNMENT,
    )
    module.initialize_logical_weights_placements_and_offsets()
    stored = 4 * DIM if code == "fp32" else DIM + module.scale_bias_size_in_bytes
    return Tbe(
        module=module,
        host_size=module.host_size,
        offsets=tuple(module.weights_physical_offsets),
        row_bytes=stored + -stored % ROW_ALIGNMENT,
    )


def build_torchrec(tbe: Any) -> Any:
    """Build TorchRec's quantised module around a kernel that has its weights."""
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
    from torchrec.quant.embedding_modules import EmbeddingBagCollection

    spec = flat_spec("dlrm", 1)
    collection = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=table.name,
                embedding_dim=DIM,
                num_embeddings=1,  # what it makes of them is replaced by the shared file
                feature_names=[feature.name],
                data_type=DataType.INT8,
            )
            for table, feature in zip(spec.tables, spec.features, strict=True)
        ],
        is_weighted=False,
        device=torch.device("cpu"),
    )
    assert len(collection._emb_modules) == 1 and len(spec.features) == FEATURES
    collection._emb_modules[0] = tbe
    return collection
