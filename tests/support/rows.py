"""Random rows: batches, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmt_convert.data import Bag, Batch
from dmt_convert.spec import ModelSpec
from support.specs import CLICK_NAMES, CLICK_ROWS

NUM_DENSE = 5


def random_bag(
    rng: np.random.Generator, rows: int, size: int, *, most: int = 1, first: int = 0
) -> Bag:
    """Ids from `first` to below `rows`: one in each of `size` bags, or 0 to `most` of them."""
    lengths = np.ones(size, dtype=np.int64) if most == 1 else rng.integers(0, most + 1, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Bag(values=rng.integers(first, rows, int(offsets[-1])), offsets=offsets)


def build_batch(
    spec: ModelSpec,
    size: int = 16,
    *,
    seed: int = 0,
    multi: bool = False,
    weighted: bool = False,
) -> Batch:
    """Labelled rows for a model; `multi`: bags of 0 to 3 ids, perhaps `weighted`."""
    rng = np.random.default_rng((seed, 7))
    bags = []
    for feature in spec.features:
        bag = random_bag(rng, spec.table_of(feature.name).rows, size, most=3 if multi else 1)
        weights = rng.random(len(bag.values)).astype(np.float32) if weighted else None
        bags.append(Bag(values=bag.values, offsets=bag.offsets, weights=weights))
    return Batch(
        dense=rng.standard_normal((size, spec.num_dense)).astype(np.float32),
        feature_names=spec.feature_names,
        bags=tuple(bags),
        labels=rng.integers(0, 2, size).astype(np.float32),
    )


def write_schema(folder: Path, names: Sequence[str]) -> None:
    """Name the sparse features of the arrays in a folder."""
    schema = {"sparse_features": [{"name": name} for name in names]}
    (folder / "schema.json").write_text(json.dumps(schema))


def write_clicks(
    folder: Path,
    name: str,
    count: int,
    *,
    seed: int,
    tables: Sequence[int] = CLICK_ROWS,
    **changes: Any,
) -> Path:
    """Rows whose label can be learnt from ids and dense inputs; `changes` replace arrays."""
    folder.mkdir(exist_ok=True)
    truth = np.random.default_rng(7)
    effects = [truth.standard_normal(rows) * 1.5 for rows in tables]
    rng = np.random.default_rng(seed)
    sparse = np.stack([rng.integers(0, rows, count) for rows in tables], axis=1).astype(np.int32)
    dense = rng.standard_normal((count, NUM_DENSE)).astype(np.float32)
    logits = sum(effect[sparse[:, f]] for f, effect in enumerate(effects)) + dense[:, 0]
    label = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    arrays = {"dense": dense, "sparse": sparse, "label": label, **changes}
    path = folder / f"{name}.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    write_schema(folder, CLICK_NAMES)
    return path


def write_probe(
    path: Path,
    dense: npt.NDArray[np.float32],
    bags: dict[str, Bag],
    **arrays: npt.NDArray[Any],
) -> Path:
    """Write a probe: dense inputs, bags by feature, and perhaps logits or labels."""
    for i, bag in enumerate(bags.values()):
        arrays |= {f"values_{i}": bag.values, f"offsets_{i}": bag.offsets}
        if bag.weights is not None:
            arrays[f"weights_{i}"] = bag.weights
    np.savez(path, dense=dense, feature_names=np.array(list(bags)), **arrays)
    return path
