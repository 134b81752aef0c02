"""ShardedTensors as a pickle describes them: the shards of one rank, and where all shards lie.

Source: `torch/distributed/_shard/sharded_tensor/api.py`, `__getstate__`. Loading one with torch
takes a process group of the same size; here it is data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.checkpoint.flat_checkpoint import ITEM_BYTES
from dmt_convert.checkpoint.inert.objects import Record, TensorRef, is_size, read_sizes
from dmt_convert.errors import CheckpointError

_SHARDED: Final = (
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
    "torch.distributed._shard.sharded_tensor.ShardedTensor",
)
_NOT_MERGED: Final = (
    "torch.distributed.tensor.DTensor",
    "torch.distributed._tensor.DTensor",
    "torch.distributed._tensor.api.DTensor",
    "torch.distributed.tensor._api.DTensor",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlace:
    """Where one shard lies."""

    starts: tuple[int, ...]
    """Index of its first element in the whole tensor."""
    sizes: tuple[int, ...]
    """Its shape."""
    rank: int | None
    """The rank that holds it, if the file says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedRef:
    """A tensor of which a file holds some shards."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    places: tuple[ShardPlace, ...]
    """All shards of all ranks."""
    local: tuple[tuple[ShardPlace, TensorRef], ...]
    """The shards in this file."""
    rank: int
    """The rank that wrote the file."""
    world_size: int
    """How many ranks there were."""


def as_sharded(record: Record, name: str, path: Path) -> ShardedRef | None:
    """Read a record as a ShardedTensor; None if it is something else.

    Raises:
        CheckpointError: It is one, and damaged; or another kind of shard.
    """
    if record.origin in _NOT_MERGED:
        raise CheckpointError(
            f"{path} holds one rank's shards of a sharded model: {name} is a DTensor",
            expected="whole tensors, or ShardedTensors as DMP saves them",
            hint="save the model of all ranks with torch.distributed.checkpoint.save, and give "
            "that directory",
        )
    if record.origin not in _SHARDED:
        return None
    try:
        return _read(record)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: {name} is a ShardedTensor that cannot be read "
            f"({type(error).__name__}: {error})",
            expected="the state that torch pickles: shards, metadata, ranks",
            hint="the file is damaged, or of a version that is not known yet; report it",
        ) from None


def _read(record: Record) -> ShardedRef:
    state = record.args[-1]
    if not isinstance(state, tuple) or len(state) < 3:
        raise TypeError("no state")
    shards, metadata, group = state[:3]
    local = tuple((_place(shard.get("metadata")), _tensor(shard)) for shard in _list(shards))
    properties = metadata.get("tensor_properties")
    dtype = properties.args[-1][0]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TypeError("no dtype that is known")
    places = tuple(_place(entry) for entry in _list(metadata.get("shards_metadata")))
    for place, tensor in local:
        if place.sizes != tensor.shape or tensor.dtype != dtype or place not in places:
            raise ValueError(f"a shard of shape {list(tensor.shape)} in {tensor.dtype}")
    rank, world_size = group.get("global_rank"), group.get("global_world_size")
    if not (is_size(rank) and is_size(world_size)):
        raise TypeError("no rank")
    return ShardedRef(
        dtype=dtype,
        shape=read_sizes(metadata.get("size")),
        places=places,
        local=local,
        rank=rank,
        world_size=world_size,
    )


def _tensor(shard: Any) -> TensorRef:
    tensor = shard.get("tensor")
    if not isinstance(tensor, TensorRef):
        raise TypeError("a shard without a tensor")
    return tensor


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} for a list of shards")
    return value


def _place(entry: Any) -> ShardPlace:
    placement = entry.fields.get("placement")
    rank = placement.fields.get("_rank") if isinstance(placement, Record) else None
    return ShardPlace(
        starts=read_sizes(entry.get("shard_offsets")),
        sizes=read_sizes(entry.get("shard_sizes")),
        rank=rank if is_size(rank) else None,
    )
