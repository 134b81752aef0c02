"""The container and the family of docs/extending.md, as they stand there."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import CheckpointError
from dmt_convert.families import FeatureConfig, ModelConfig, infer_model
from dmt_convert.model import open_flat_model
from support.paths import REPOSITORY

ROWS = {"user": 7, "item": 5}


def install(site: Path, code: str, declared: str) -> None:
    """Write a distribution: a module, and the entry points of its pyproject.toml."""
    lines = []
    for group, entries in tomllib.loads(declared)["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        module = next(iter(entries.values())).partition(":")[0]
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    sys.modules.pop(module, None)


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both examples, as distributions of their own, put where the page says."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    declared = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    for code, toml in zip(examples, declared, strict=True):
        install(tmp_path / "site", code, toml)
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What the example trainer saves."""
    torch.manual_seed(0)
    layers = {"bottom.0": nn.Linear(3, 4), "top.0": nn.Linear(7, 5), "top.1": nn.Linear(5, 1)}
    state = {f"embeddings.{name}.weight": torch.randn(rows, 4) for name, rows in ROWS.items()}
    for name, layer in layers.items():
        state |= {f"{name}.{kind}": value.detach() for kind, value in layer.state_dict().items()}
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, value in state.items():
        np.save(folder / f"{name}.npy", value.numpy())
    return folder


def batch() -> Batch:
    rng = np.random.default_rng(0)
    offsets = np.arange(6, dtype=np.int64)
    bags = (Bag(values=rng.integers(0, rows, 5), offsets=offsets) for rows in ROWS.values())
    dense = rng.standard_normal((5, 3)).astype(np.float32)
    return Batch(dense=dense, feature_names=tuple(ROWS), bags=tuple(bags))


def logits(folder: Path, rows: Batch) -> torch.Tensor:
    """What the example trainer computes."""
    state = {file.stem: torch.from_numpy(np.load(file)) for file in folder.glob("*.npy")}
    linear = nn.functional.linear
    dense = torch.relu(
        linear(torch.from_numpy(rows.dense), state["bottom.0.weight"], state["bottom.0.bias"])
    )
    pooled = [
        state[f"embeddings.{name}.weight"][torch.from_numpy(bag.values)]
        for name, bag in zip(rows.feature_names, rows.bags, strict=True)
    ]
    vectors = torch.stack([dense, *pooled], dim=1)
    gram = vectors @ vectors.transpose(1, 2)
    pairs = gram[:, *torch.tril_indices(3, 3, -1)]
    hidden = torch.relu(
        linear(torch.cat([dense, pairs], dim=1), state["top.0.weight"], state["top.0.bias"])
    )
    return linear(hidden, state["top.1.weight"], state["top.1.bias"]).squeeze(1)


@pytest.mark.usefixtures("documented")
def test_the_examples_read_a_checkpoint(saved: Path) -> None:
    config = ModelConfig(features=tuple(FeatureConfig(name=name) for name in ROWS))
    info = infer_model(open_checkpoint(saved), config)
    assert info.spec.family == "example" and info.checkpoint.format == "npy-folder"
    rows = batch()
    expected = logits(saved, rows)
    with torch.inference_mode():
        found = open_flat_model(info)(rows)
        torch.testing.assert_close(found, expected)
        np.save(saved / "top.0.bias.npy", np.load(saved / "top.0.bias.npy") + np.float32(0.1))
        changed = open_flat_model(infer_model(open_checkpoint(saved), config))(rows)
    assert not torch.allclose(changed, expected)


@pytest.mark.usefixtures("documented")
def test_the_example_container_refuses_damaged_files(saved: Path) -> None:
    file = saved / "top.0.weight.npy"
    whole = np.load(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(saved)
    np.save(file, whole.astype(">f4"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(saved)
