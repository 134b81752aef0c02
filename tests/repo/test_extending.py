"""The container and the family of docs/extending.md, as they stand there."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint, registry
from dmt_convert.data import Bag, Batch
from dmt_convert.errors import CheckpointError
from dmt_convert.families import FeatureConfig, ModelConfig, infer_model
from dmt_convert.model import open_flat_model

ROWS = {"user": 7, "item": 5}


@pytest.fixture
def documented(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container, put where the page says; the family, in an installed package of its own."""
    page = (repository / "docs" / "extending.md").read_text()
    container, family = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "documented.py").write_text(container)
    names = runpy.run_path(str(tmp_path / "documented.py"))
    monkeypatch.setattr(registry, "READERS", (names["NpyFolderReader"](), *registry.READERS))

    (toml,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    (group,) = tomllib.loads(toml)["project"]["entry-points"].items()
    site = tmp_path / "site"
    info = site / "acme_dlrm-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_dlrm.py").write_text(family)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-dlrm\nVersion: 1.0\n")
    points = "".join(f"{name} = {value}\n" for name, value in group[1].items())
    (info / "entry_points.txt").write_text(f"[{group[0]}]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "acme_dlrm", raising=False)


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
    with pytest.raises(CheckpointError, match="is no array that can be read"):
        open_checkpoint(saved)
    np.save(file, whole.astype(">f4"))
    with pytest.raises(CheckpointError, match="is no array that can be read"):
        open_checkpoint(saved)
