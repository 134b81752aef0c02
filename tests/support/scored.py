"""A dot model that is small enough to score by hand, bundles of it, and rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.partition import PartitionConfig
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.rows import random_bag, write_probe
from support.specs import CLICK_NAMES

ROWS = (20, 30, 7, 11)


def write_model(path: Path, **options: Any) -> Path:
    """A dot model of four features and two dense inputs."""
    widths: dict[str, Any] = {"dim": 4, "num_dense": 2, "dense": (), "hidden": 6}
    return make_flat(path, rows=ROWS, **{**widths, **options})


def convert_model(checkpoint: Path, out: Path, module: Any = "passthrough") -> Path:
    """Convert into two towers."""
    partition = PartitionConfig(num_towers=2, strategy="round-robin")
    return convert_quickly(checkpoint, out, partition=partition, tower_module=module).path


def write_rows(
    path: Path, rows: int, *, logits: npt.NDArray[np.float32] | None = None, seed: int = 0
) -> Path:
    """A probe of random rows with bags of 0 to 3 ids."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((rows, 2)).astype(np.float32)
    bags = {
        name: random_bag(rng, size, rows, most=3)
        for name, size in zip(CLICK_NAMES, ROWS, strict=True)
    }
    return write_probe(path, dense, bags, **({} if logits is None else {"logits": logits}))
