"""Columns of zeros beside tables: kernels take multiples of four columns, tables have any number.

Only this module and the lookup see them. What the lookup returns is cut to the true width; so are
the shards that others load, save and count. The added columns get no gradient and stay zero.

Row-wise Adagrad divides a row's squares by the number of columns that the kernel sees, P, but the
table has N. The gradient that enters the kernel is therefore multiplied by sqrt(P / N): then the
mean over P is that of the plain gradient over N, which is what is summed and saved. To leave the
step as it was, the learning rate is divided by the same root.

Letters: B samples, N columns of a table, P those in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard

from dmt_convert.cluster.transport import Transport
from dmt_convert.placement import padded_dim
from dmt_convert.spec import TableSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Columns of a table."""

    dim: int
    """N."""
    factor: float = 1.0
    """What its gradient is multiplied by, and its learning rate divided by."""

    @property
    def padded(self) -> int:
        """P."""
        return padded_dim(self.dim)

    @property
    def is_padded(self) -> bool:
        """Whether there are columns of zeros."""
        return self.padded != self.dim


def find_widths(tables: Iterable[TableSpec], fused_params: Mapping[str, Any]) -> dict[str, Width]:
    """Say how tables are kept: table -> width.

    Args:
        tables: The tables.
        fused_params: What moves them, from `fused_parameters`.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    rowwise = fused_params["optimizer"] is EmbOptimType.EXACT_ROWWISE_ADAGRAD
    return {
        table.name: Width(
            dim=table.dim, factor=math.sqrt(padded_dim(table.dim) / table.dim) if rowwise else 1.0
        )
        for table in tables
    }


class Trim:
    """Cuts pooled embeddings to their true widths.

    Args:
        widths: Of the features, side by side.
        transport: Of this rank.
    """

    def __init__(self, widths: Sequence[Width], transport: Transport) -> None:
        columns: list[int] = []
        factors: list[float] = []
        start = 0
        for width in widths:
            columns += range(start, start + width.dim)
            factors += [width.factor] * width.dim
            start += width.padded
        self.total = start
        self._columns = transport.put(torch.tensor(columns, dtype=torch.int64))
        self._factors = transport.put(torch.tensor(factors, dtype=torch.float32))

    def __call__(self, pooled: Tensor) -> Tensor:
        """Map (B, sum of P) to (B, sum of N)."""
        cut: Tensor = _Cut.apply(pooled, self._columns, self._factors)  # type: ignore[no-untyped-call]
        return cut


def make_trim(widths: Sequence[Width], transport: Transport) -> Trim | None:
    """Make a `Trim`; None if there is nothing to cut."""
    return Trim(widths, transport) if any(width.is_padded for width in widths) else None


class _Cut(torch.autograd.Function):
    """Selects columns; backward, multiplies their gradients and puts them among zeros."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
        ctx.columns, ctx.factors, ctx.shape = columns, factors, pooled.shape
        return pooled.index_select(1, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole.index_copy_(1, ctx.columns, gradient * ctx.factors)
        return whole, None, None


def trim_shards(value: ShardedTensor, dim: int) -> ShardedTensor:
    """Return a table, or a state of its shape, without the columns of zeros; shares memory.

    Args:
        value: Shape (rows, P); no shard is cut into columns.
        dim: N.
    """

    def cut(metadata: ShardMetadata) -> ShardMetadata:
        return ShardMetadata(
            shard_offsets=list(metadata.shard_offsets),
            shard_sizes=[metadata.shard_sizes[0], dim],
            placement=metadata.placement,
        )

    whole, shards = value.metadata(), value.local_shards()
    trimmed = ShardedTensor._init_from_local_shards_and_global_metadata(
        [
            # torch asks for tensors without gaps; of the right shape, over the same memory
            Shard(tensor.view(-1)[: len(tensor) * dim].view(-1, dim), cut(shard.metadata))
            for shard in shards
            for tensor in (shard.tensor,)
        ],
        ShardedTensorMetadata(
            shards_metadata=[cut(metadata) for metadata in whole.shards_metadata],
            size=torch.Size([whole.size[0], dim]),
            tensor_properties=whole.tensor_properties,
        ),
        process_group=value._process_group,
    )
    for made, shard in zip(trimmed.local_shards(), shards, strict=True):
        made.tensor = shard.tensor[:, :dim]
    return trimmed
