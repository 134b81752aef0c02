"""Two ranks save one DCP directory with row-wise and column-wise shards; run by `rank_server`."""

from __future__ import annotations

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def full_state() -> dict[str, torch.Tensor]:
    """What all ranks hold together; odd sizes make the shards uneven."""
    return {
        "rows": torch.arange(7 * 4, dtype=torch.float32).reshape(7, 4),
        "columns": torch.arange(5 * 6, dtype=torch.bfloat16).reshape(5, 6),
        "one_row": torch.arange(4, dtype=torch.float16).reshape(1, 4),
        "vector": torch.arange(9, dtype=torch.float32),
        "whole": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    }


def save(folder: str) -> None:
    """Save this rank's part of everything."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    places = {"columns": Shard(1), "whole": Replicate()}
    sharded = {
        name: distribute_tensor(tensor, mesh, [places.get(name, Shard(0))])
        for name, tensor in full_state().items()
    }
    dcp.save({"model": sharded, "epoch": 3}, checkpoint_id=folder)


SCENARIOS = {"save": save}
