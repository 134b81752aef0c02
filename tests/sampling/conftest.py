"""A small checkpoint with optimizer state, and its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.families import ModelConfig, infer_model

NAME = "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight"
ROWS = (20, 30, 7)


def write_checkpoint(
    path: Path, *, dim: int = 4, state: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A dot model of three features; `state`: optimizer state by parameter name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = {NAME.format(f"t_f{i}"): draw(rows, dim) for i, rows in enumerate(ROWS)}
    for stem, widths in (
        ("dense_arch.model._mlp.{}._linear", (2, dim)),
        ("over_arch.model.0._mlp.{}._linear", (dim + 6, 5)),
        ("over_arch.model.1", (5, 1)),
    ):
        model[stem.format(0) + ".weight"] = draw(widths[1], widths[0])
        model[stem.format(0) + ".bias"] = draw(widths[1])
    content: dict[str, Any] = {"model": model}
    if state is not None:
        content["optimizer"] = {"state": state}
    torch.save(content, path)
    return path


@pytest.fixture
def info(tmp_path: Path) -> Callable[..., Any]:
    """Write a checkpoint and infer its model."""

    def build(pooling: str = "sum", **options: Any) -> Any:
        path = write_checkpoint(tmp_path / "model.pt", **options)
        return infer_model(open_checkpoint(path), ModelConfig(pooling=pooling))

    return build


@pytest.fixture
def vector(tmp_path: Path) -> Callable[..., Any]:
    """Save one tensor and return what the header says of it."""

    def build(values: Any, name: str = "sum") -> Any:
        path = tmp_path / "state.pt"
        if not isinstance(values, torch.Tensor):
            values = torch.as_tensor(np.asarray(values))
        torch.save({"state": {name: values}}, path)
        return next(t for t in open_checkpoint(path).tensors if t.name == name)

    return build
