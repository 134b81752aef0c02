"""The recipe that trains flat models saves what `dmt convert` reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.families import infer_model
from dmt_convert.recipes.train_flat import TrainConfig, save_flat, train_flat


@pytest.mark.parametrize("arch", ["dlrm", "dcn"])
def test_features_keep_their_order(arch: str, tmp_path: Path) -> None:
    """Names that are neither sorted nor numbered: only the order of the file tells."""
    random, names = np.random.default_rng(0), ("user", "item", "city")
    for split in ("train", "valid", "test"):
        ids, labels = random.integers(5, size=(64, 3)), random.integers(2, size=64)
        np.savez(tmp_path / f"{split}.npz", sparse=ids, label=labels, dense=np.zeros((64, 0)))
    schema = {"dense_features": [], "sparse_features": [{"name": name} for name in names]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    config = TrainConfig(
        data=tmp_path,
        arch=arch,  # type: ignore[arg-type]
        embedding_dim=4,
        dense_layers=(4,),
        over_layers=(4,),
        epochs=1,
    )
    save_flat(*train_flat(config), tmp_path / "flat.pt")
    info = infer_model(open_checkpoint(tmp_path / "flat.pt"))
    assert info.spec.feature_names == names
    assert {f"tables.t_{name}.weight" for name in names} <= set(info.optimizer_state)
