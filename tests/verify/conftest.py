"""A small checkpoint, bundles made of it, and data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.convert import convert_checkpoint
from dmt_convert.convert_config import ConvertConfig

ROWS = (20, 30, 7, 11)


def write_checkpoint(path: Path, *, dim: int = 4, seed: int = 0) -> Path:
    """A dot model of four features and two dense inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        f"sparse_arch.embedding_bag_collection.embedding_bags.t_f{i}.weight": torch.randn(
            rows, dim, generator=generator
        )
        for i, rows in enumerate(ROWS)
    }
    for stem, widths in (
        ("dense_arch.model._mlp.0._linear", (2, dim)),
        ("over_arch.model.0._mlp.0._linear", (dim + 10, 6)),
        ("over_arch.model.1", (6, 1)),
    ):
        model[f"{stem}.weight"] = torch.randn(widths[1], widths[0], generator=generator)
        model[f"{stem}.bias"] = torch.randn(widths[1], generator=generator)
    torch.save(model, path)
    return path


def write_bundle(checkpoint: Path, out: Path, module: str = "passthrough") -> Path:
    """Convert into two towers."""
    config = ConvertConfig(
        partition=PartitionConfig(num_towers=2, strategy="round-robin"), tower_module=module
    )
    convert_checkpoint(checkpoint, out, config=config)
    return out


def write_rows(path: Path, rows: int, *, logits: np.ndarray | None = None, seed: int = 0) -> Path:
    """A probe of random rows with bags of 0 to 3 ids."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {
        "dense": rng.standard_normal((rows, 2)).astype(np.float32),
        "feature_names": np.array([f"f{i}" for i in range(4)]),
    }
    for i, size in enumerate(ROWS):
        lengths = rng.integers(0, 4, rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        arrays[f"values_{i}"] = rng.integers(0, size, offsets[-1])
        arrays[f"offsets_{i}"] = offsets
    if logits is not None:
        arrays["logits"] = logits
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("flat") / "model.pt")


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One per kind of module."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        module: write_bundle(checkpoint, folder / module, module)
        for module in ("passthrough", "dlrm")
    }


@pytest.fixture
def write_probe():
    return write_rows


@pytest.fixture
def write_model():
    return write_checkpoint


@pytest.fixture
def convert():
    return write_bundle
