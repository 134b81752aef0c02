"""A tiny state dict, and every container to put it in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

StateDict = dict[str, torch.Tensor]
Save = Callable[[Any, Path], Path]


def tiny_state() -> StateDict:
    """The tensors of a facebook DLRM with three tables, in its own order."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "emb_l.0.weight": (5, 4),
        "emb_l.1.weight": (1, 4),
        "emb_l.2.weight": (9, 4),
        "bot_l.0.weight": (4, 3),
        "bot_l.0.bias": (4,),
        "top_l.0.weight": (1, 10),
        "top_l.0.bias": (1,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_torch(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def save_legacy(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def save_safetensors(state: Any, folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_dcp(state: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def save_indexed(state: StateDict, folder: Path, kind: str = "safetensors") -> Path:
    """Write two shards and an index, as `save_pretrained` does."""
    folder.mkdir(exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for part, names in enumerate((list(state)[:3], list(state)[3:]), start=1):
        shard = folder / f"{stem}-0000{part}-of-00002.{kind}"
        tensors = {name: state[name] for name in names}
        save_file(tensors, shard) if kind == "safetensors" else torch.save(tensors, shard)
        weight_map.update(dict.fromkeys(names, shard.name))
    index = {"metadata": {"total_size": 7}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


SAVES: dict[str, Save] = {
    "torch": save_torch,
    "legacy": save_legacy,
    "safetensors": save_safetensors,
    "dcp": save_dcp,
}


def save_nested(state: Any, folder: Path) -> Path:
    return save_torch({"run": {"model": state}, "optimizer": {"lr": 0.1}, "epoch": 3}, folder)


def save_nested_dcp(state: Any, folder: Path) -> Path:
    return save_dcp({"model": state, "optimizer": {"state": {}}}, folder)


NESTED_SAVES: dict[str, Save] = {
    "pt": save_torch,
    "legacy": save_legacy,
    "nested": save_nested,
    "safetensors": save_safetensors,
    "dcp": save_dcp,
    "nested dcp": save_nested_dcp,
}
"""Also with the weights inside of something else."""
