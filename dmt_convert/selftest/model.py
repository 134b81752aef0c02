"""A small flat model and its data, made up: what the self-test converts, trains and exports."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

_ROWS: Final = (50_000, 7, 300, 11, 1_000, 40, 6, 2_000)
"""Of the tables."""
_DIM: Final = 16
_NUM_DENSE: Final = 5
_TABLE: Final = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{}.weight"


def write_flat(path: Path) -> None:
    """Write a DLRM under TorchRec's names."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, torch.zeros(outputs)

    for i, rows in enumerate(_ROWS):
        state[_TABLE.format(i)] = torch.randn(rows, _DIM, generator=generator) / _DIM**0.5
    for i, (inputs, outputs) in enumerate(pairwise((_NUM_DENSE, 32, _DIM))):
        linear(f"dense_arch.model._mlp.{i}._linear", inputs, outputs)
    vectors = len(_ROWS) + 1
    linear("over_arch.model.0._mlp.0._linear", _DIM + vectors * (vectors - 1) // 2, 32)
    linear("over_arch.model.1", 32, 1)
    torch.save(state, path)


def write_data(folder: Path) -> None:
    """Write rows to train and to measure on; the labels follow from ids and dense inputs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    effects = [rng.standard_normal(rows) for rows in _ROWS]
    for name, count in (("train", 4096), ("valid", 1024)):
        sparse = np.stack([rng.integers(0, rows, count) for rows in _ROWS], axis=1)
        dense = rng.standard_normal((count, _NUM_DENSE)).astype(np.float32)
        logits = dense[:, 0] + sum(effect[sparse[:, f]] for f, effect in enumerate(effects))
        labels = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
        np.savez(folder / f"{name}.npz", dense=dense, sparse=sparse.astype(np.int32), label=labels)
    names = [{"name": f"cat_{i}"} for i in range(len(_ROWS))]
    (folder / "schema.json").write_text(json.dumps({"sparse_features": names}), encoding="utf-8")
