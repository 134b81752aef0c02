"""A small checkpoint with optimizer state, as sampling sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmt_convert.checkpoint import TensorInfo, open_checkpoint
from dmt_convert.families import FlatModelInfo, ModelConfig, infer_model
from support.checkpoints.flat import make_flat

ROWS = (20, 30, 7)


def flat_info(
    folder: Path,
    *,
    pooling: Any = "sum",
    state: dict[str, Any] | None = None,
    dim: int = 4,
    seed: int = 0,
) -> FlatModelInfo:
    """What is inferred of a dot model of three features.

    `state` is optimizer state by parameter name.
    """

    def nest(model: dict[str, Any]) -> None:
        content: dict[str, Any] = {"model": dict(model)}
        if state is not None:
            content["optimizer"] = {"state": state}
        model.clear()
        model.update(content)

    widths = {"rows": ROWS, "dim": dim, "num_dense": 2, "dense": (), "hidden": 5}
    path = make_flat(folder / "model.pt", edit=nest, seed=seed, **widths)
    return infer_model(open_checkpoint(path), ModelConfig(pooling=pooling))


def saved_vector(folder: Path, values: Any, name: str = "sum") -> TensorInfo:
    """Save one tensor and return what the header says of it."""
    path = folder / "state.pt"
    if not isinstance(values, torch.Tensor):
        values = torch.as_tensor(np.asarray(values))
    torch.save({"state": {name: values}}, path)
    return next(t for t in open_checkpoint(path).tensors if t.name == name)
