"""The documented example: its file out of the docs, a checkpoint, and rows with its answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert import adapter
from dmt_convert.data import Bag
from support.paths import REPOSITORY
from support.rows import write_probe, write_schema

ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Files of the example."""

    model: Path
    checkpoint: Path
    probe: Path
    """Rows, and the original model's logits."""


def bag(rows: list[list[int]]) -> Bag:
    offsets = np.cumsum([0, *map(len, rows)])
    return Bag(values=np.array([i for row in rows for i in row], np.int64), offsets=offsets)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("ctr")
    text = (REPOSITORY / "docs/capture.md").read_text(encoding="utf-8")
    (folder / "ctr.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    builder = adapter.load_adapter(folder / "ctr.py")
    assert isinstance(builder, adapter.LoadedBuilder)
    torch.manual_seed(0)
    module = builder.build()
    module.top[1].running_mean.normal_()
    module.top[1].running_var.uniform_(0.5, 2)
    torch.save({"model": module.state_dict(), "epoch": 3}, folder / "ckpt.pt")
    rng = np.random.default_rng(0)
    last = [[int(i) for i in rng.integers(1, 40, rng.integers(0, 4))] for _ in range(ROWS)]
    user, item = rng.integers(0, 60, ROWS), rng.integers(0, 40, ROWS)
    dense = rng.random((ROWS, 2), dtype=np.float32)
    batch = {
        "user": torch.from_numpy(user),
        "item": torch.from_numpy(item),
        "last_items": torch.tensor([row + [0] * (3 - len(row)) for row in last]),
        "dense": torch.from_numpy(dense),
    }
    with torch.no_grad():
        doubled = {**batch, "dense": batch["dense"].double()}
        logits = module.eval().double()(doubled).logit().float().numpy()
    bags = {"user": bag([[i] for i in user]), "item": bag([[i] for i in item])}
    write_probe(folder / "probe.npz", dense, bags | {"last_items": bag(last)}, logits=logits)
    write_schema(folder, ["user", "item", "last_items"])
    return Example(
        model=folder / "ctr.py", checkpoint=folder / "ckpt.pt", probe=folder / "probe.npz"
    )
