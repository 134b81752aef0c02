"""Writes what `torch.save(model.state_dict())` of a sharded model leaves on each rank.

The classes are torch's own, pickled as `ShardedTensor.__reduce_ex__` does, without the process
group that making a real one takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_wrapper_subclass
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec

Block = tuple[int, int, int, int, int]
"""First row, first column, rows, columns, rank."""


class PickledTensor:
    """A ShardedTensor as one rank pickles it."""

    def __init__(self, whole: torch.Tensor, blocks: Sequence[Block], rank: int, ranks: int) -> None:
        places = [ShardMetadata([b[0], b[1]], [b[2], b[3]], f"rank:{b[4]}/cpu") for b in blocks]
        shards = [
            Shard(whole[b[0] : b[0] + b[2], b[1] : b[1] + b[3]].clone(), place)
            for b, place in zip(blocks, places, strict=True)
            if b[4] == rank
        ]
        metadata = ShardedTensorMetadata(
            places, whole.shape, TensorProperties(dtype=whole.dtype, layout=torch.strided)
        )
        group = ShardedTensor.ProcessGroupState(rank, rank, ranks, ranks)
        spec = EnumerableShardingSpec.__new__(EnumerableShardingSpec)  # which refuses overlaps
        spec.shards = places
        self.whole = whole
        self.state = (shards, metadata, group, spec, False)

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self.whole
        shape = (tensor.dtype, tuple(tensor.shape), tensor.stride(), 0, tensor.layout)
        args = (ShardedTensor, *shape, tensor.device, False)
        return _rebuild_from_type_v2, (_rebuild_wrapper_subclass, ShardedTensor, args, self.state)


def save_ranks(
    folder: Path,
    tables: Mapping[str, tuple[torch.Tensor, Sequence[Block]]],
    dense: Mapping[str, torch.Tensor],
    *,
    ranks: int = 2,
    name: str = "dmp_rank{}.pt",
    **options: Any,
) -> list[Path]:
    """Write one file per rank."""
    paths = [folder / name.format(rank) for rank in range(ranks)]
    for rank, path in enumerate(paths):
        state: OrderedDict[str, Any] = OrderedDict(dense)
        for table, (whole, blocks) in tables.items():
            state[table] = PickledTensor(whole, blocks, rank, ranks)
        torch.save(state, path, **options)
    return paths
