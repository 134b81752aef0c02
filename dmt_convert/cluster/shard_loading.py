"""Tables from a bundle's files into the shards of the ranks.

Letters: R rows of a table, N its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch

from dmt_convert.checkpoint import TensorInfo, gather_rows
from dmt_convert.cluster.cluster_model import ShardedModel, table_of

_CHUNK_BYTES: Final = 8 << 20
"""Of a table, read at once."""


def load_shards(
    model: ShardedModel,
    infos: Mapping[str, TensorInfo],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill this rank's shards; every rank reads its own parts of the files.

    Args:
        model: The sharded model.
        infos: Table -> its tensor in a file; fp16 and bf16 become fp32.
        on_bytes: Told of every piece read, for progress.
    """
    for table, top, left, part in table_shards(model):
        info = infos[table]
        rows, cols = part.shape
        step = max(1, _CHUNK_BYTES // (4 * max(1, info.shape[1])))
        with torch.no_grad():
            for first in range(0, rows, step):
                last = min(rows, first + step)
                values = gather_rows(info, np.arange(top + first, top + last))
                part[first:last] = torch.from_numpy(values[:, left : left + cols])
                on_bytes(values.nbytes)


def table_shards(model: ShardedModel) -> list[tuple[str, int, int, torch.Tensor]]:
    """List this rank's shards: table, first row, first column, rows of it (shares memory)."""
    found = []
    for name, value in model.trim(model.towers.state_dict()).items():
        if ".embedding_bags." not in name:
            continue
        table = table_of(name)
        found += [(table, *_place(shard)) for shard in value.local_shards()]
    return found


def _place(shard: Any) -> tuple[int, int, torch.Tensor]:
    top, left = shard.metadata.shard_offsets
    return int(top), int(left), shard.tensor
