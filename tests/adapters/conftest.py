"""The documented example: its adapter out of the docs, a checkpoint as its trainer writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert import adapter
from dmt_convert.data import Bag
from dmt_convert.model.networks import network_size
from support.paths import REPOSITORY
from support.rows import random_bag, write_probe, write_schema

ROWS = {"t_user": 60, "t_item": 40, "t_shop": 9}
FEATURES = {
    "user": ("t_user", "sum"),
    "item": ("t_item", "sum"),
    "last_items": ("t_item", "mean"),
    "shop": ("t_shop", "sum"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Files of the example."""

    model: Path
    checkpoint: Path
    probe: Path
    """Rows, and the original model's logits."""
    clicks: Path
    """Labelled rows."""


def adapter_text() -> str:
    text = (REPOSITORY / "docs/adapters.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


class Original(nn.Module):
    """The trainer's model, as far as its state dict and its arithmetic go."""

    def __init__(self, dense_part: nn.Module) -> None:
        super().__init__()
        self.ebc = nn.ModuleDict(
            {
                "embedding_bags": nn.ModuleDict(
                    {name: nn.EmbeddingBag(rows, 16) for name, rows in ROWS.items()}
                )
            }
        )
        self.dense_part = dense_part

    def forward(self, dense, bags):
        pooled = [
            nn.functional.embedding_bag(
                torch.from_numpy(bags[name].values),
                self.ebc["embedding_bags"][table].weight,
                torch.from_numpy(bags[name].offsets),
                mode=mode,
                include_last_offset=True,
            )
            for name, (table, mode) in FEATURES.items()
        ]
        return self.dense_part(torch.from_numpy(dense), pooled)


def draw_bags(rng: np.random.Generator, rows: int) -> dict[str, Bag]:
    return {
        name: random_bag(rng, ROWS[table], rows, most=3 if mode == "mean" else 1)
        for name, (table, mode) in FEATURES.items()
    }


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> Example:
    folder = tmp_path_factory.mktemp("xlrm")
    model = folder / "xlrm.py"
    model.write_text(adapter_text(), encoding="utf-8")
    loaded = adapter.load_adapter(model)
    torch.manual_seed(0)
    original = Original(loaded.adapter.network([16] * 4, 6)).eval()
    torch.save({"model": original.state_dict()}, folder / "ckpt.pt")
    rng = np.random.default_rng(0)
    dense, bags = rng.random((64, 6), dtype=np.float32), draw_bags(rng, 64)
    with torch.no_grad():
        logits = original(dense, bags).numpy()
    write_probe(folder / "probe.npz", dense, bags, logits=logits)
    dense = rng.random((600, 6), dtype=np.float32)
    ids = [rng.integers(0, ROWS[table], 600) for table, _ in FEATURES.values()]
    label = (dense[:, 0] + ids[0] % 2 > 1).astype(np.uint8)
    np.savez(
        folder / "train.npz", dense=dense, sparse=np.stack(ids, 1).astype(np.int32), label=label
    )
    write_schema(folder, list(FEATURES))
    return Example(
        model=model,
        checkpoint=folder / "ckpt.pt",
        probe=folder / "probe.npz",
        clicks=folder / "train.npz",
    )


@pytest.fixture(autouse=True)
def _forget(monkeypatch) -> None:
    """What one test loaded, another has not."""
    monkeypatch.setattr(adapter, "_loaded", {})
    network_size.cache_clear()
