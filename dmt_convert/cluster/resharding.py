"""Loading a checkpoint into a model that is cut in another way.

DCP takes shards of tables from wherever they lie. The squared gradients of row-wise Adagrad are
another matter: TorchRec keeps one number per row and column shard, side by side in one vector, so
that its length depends on how a table was cut. Cut anew, every shard takes the mean over the old
ones: each is the mean of squares over its own columns, and all have the same width.

Letters: R rows of a table, k column shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.cluster.checkpoint_tensors import flatten_tensors
from dmt_convert.cluster.cluster_accumulators import SUFFIX, mean_sums
from dmt_convert.cluster.saved_checkpoint import SavedCheckpoint, read_payload
from dmt_convert.cluster.training_checkpoints import CheckpointStore


def load_state(
    store: CheckpointStore,
    saved: SavedCheckpoint,
    state: Mapping[str, Any],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """Load a checkpoint in place; all ranks at once.

    Args:
        store: The checkpoints.
        saved: The one to load.
        state: Nested dicts of tensors, as they were saved; perhaps cut in another way.
        rows: Table -> R.

    Returns:
        What was saved as progress.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    tensors = flatten_tensors(state)
    stored = {info.path: info for info in read_payload(saved.path).tensors}
    names = {f".{t}.weight.{t}{SUFFIX}": count for t, count in rows.items()}
    recut = {
        name: (tensor, stored[name], names[_tail(name)])
        for name, tensor in tensors.items()
        if name.endswith(SUFFIX)
        and name in stored
        and len(stored[name].shape) == 1
        and stored[name].shape != tuple(tensor.shape)
    }
    progress = store.load(saved, {n: t for n, t in tensors.items() if n not in recut})
    for tensor, info, count in recut.values():
        _average(tensor, info, count)
    return progress


def _tail(name: str) -> str:
    return "." + name.split(".embedding_bags.", 1)[1]


def _average(tensor: Any, info: TensorInfo, rows: int) -> None:
    """Fill the shards here with the mean over the column shards of before."""
    parts = tensor.local_shards()
    if not parts:
        return
    mean = torch.from_numpy(mean_sums(info, rows).reshape(-1))
    for part in parts:
        (start,) = part.metadata.shard_offsets
        first = int(start) % rows
        part.tensor.copy_(mean[first : first + len(part.tensor)])
