"""Saves state dicts in every container that holds any family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .models import State


def save_nested(state: State, folder: Path) -> Path:
    import torch

    path = folder / "last.ckpt"
    torch.save({"model": state, "optimizer": {"lr": 0.1}, "epoch": 3}, path)
    return path


def table_blocks(tensor: Any, ranks: int = 2) -> list[tuple[int, int, int, int, int]]:
    """Rows of a table dealt out to ranks: first row, first column, rows, columns, rank."""
    rows, cols = tensor.shape
    cut = -(-rows // ranks)
    return [
        (rank * cut, 0, min(cut, rows - rank * cut), cols, rank)
        for rank in range(ranks)
        if rows > rank * cut
    ]


def is_table(name: str) -> bool:
    return "embedding_bags" in name or name.startswith("emb_l")


def split_state(state: State) -> tuple[State, State]:
    """Tables of two rows and more, and all else."""
    tables = {name: t for name, t in state.items() if is_table(name) and t.shape[0] > 1}
    return tables, {name: t for name, t in state.items() if name not in tables}


def save_ranks(state: State, folder: Path, *, ranks: int = 2, name: str = "dmp_rank{}.pt") -> Path:
    from support.checkpoints.rank_files import save_ranks as save

    tables, dense = split_state(state)
    blocks = {key: (tensor, table_blocks(tensor, ranks)) for key, tensor in tables.items()}
    return save(folder, blocks, dense, ranks=ranks, name=name)[0]


def save_snapshot(state: State, folder: Path) -> Path:
    from support.checkpoints.torchsnapshot_files import Snapshot

    tables, dense = split_state(state)
    snapshot = Snapshot(folder)
    snapshot.keys("model", list(state))
    for name, tensor in dense.items():
        snapshot.dense(f"model/{name}", tensor)
    for name, tensor in tables.items():
        snapshot.sharded(f"model/{name}", tensor, table_blocks(tensor))
    return snapshot.finish()


def save_hub_shards(state: State, folder: Path) -> Path:
    """What torch's HuggingFaceStorageWriter leaves with `save_distributed=True` on two ranks."""
    from safetensors.torch import save_file

    tables, dense = split_state(state)
    parts: list[State] = [dict(dense), {}]
    offsets: list[dict[str, Any]] = [
        {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in dense.items()},
        {},
    ]
    for name, tensor in tables.items():
        for row, col, rows, _, rank in table_blocks(tensor):
            parts[rank][name] = tensor[row : row + rows].contiguous()
            offsets[rank][name] = {"saved_offsets": [row, col]}
    for rank, part in enumerate(parts):
        metadata = {"format": "pt", "DCP_VERSION": "1.0"}
        metadata["DCP_SHARDING_INFO"] = json.dumps(offsets[rank])
        path = folder / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors"
        save_file(part, path, metadata=metadata)
    return folder


def save_any(state: State, folder: Path, container: str) -> Path:
    """Write a state dict; returns what to open."""
    from support.checkpoints import containers

    saves: dict[str, Callable[[State, Path], Path]] = {
        **containers.SAVES,
        "indexed": lambda state, folder: containers.save_indexed(state, folder),
        "indexed-bin": lambda state, folder: containers.save_indexed(state, folder, "bin"),
        "nested": save_nested,
        "ranks": save_ranks,
        "torchsnapshot": save_snapshot,
        "hub-shards": save_hub_shards,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return saves[container](dict(state), folder)


ANY = (
    "torch",
    "safetensors",
    "dcp",
    "indexed",
    "ranks",
    "torchsnapshot",
    "legacy",
    "nested",
    "indexed-bin",
    "hub-shards",
)
"""Containers that take any state dict."""
