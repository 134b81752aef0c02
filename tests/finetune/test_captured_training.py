"""A captured model is trained over ranks as in one process, from its bundle alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dmt_convert as dmt
from dmt_convert.checkpoint import read_tensor
from dmt_convert.recipes.finetune_dmt import main
from support import captured_models as models
from support.cluster.recipe_runs import COMMON, Tuned
from support.rows import write_schema
from support.shortcuts import sample_few, skip_report

pytestmark = pytest.mark.slow


def test_ranks_train_a_captured_model_as_one_process_does(
    tune_in, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_few(monkeypatch)
    skip_report(monkeypatch)
    torch.manual_seed(0)
    bundle = dmt.convert(
        models.DeepFm(), tmp_path / "b", example=(models.matrix(),), towers=2,
        tower_module="passthrough",
    )  # fmt: skip
    x = models.matrix(700, seed=5).numpy()
    label = (x[:, 3] + x[:, 0] % 2 > 0.5).astype(np.uint8)
    rows = tmp_path / "rows" / "train.npz"
    rows.parent.mkdir()
    np.savez(rows, dense=x[:, 3:], sparse=x[:, :3].astype(np.int32), label=label)
    write_schema(rows.parent, ["x_0", "x_1", "x_2"])
    ranks = tune_in(tmp_path, "1x2", "--dense-lr", 0.01, bundle=bundle.path, data=rows, notes=None)
    ours = ("--bundle", bundle.path, "--data", rows, "--out", tmp_path / "one", *COMMON)
    torch.manual_seed(0)
    main([str(argument) for argument in (*ours, "--dense-lr", 0.01, "--quiet")])
    one = Tuned(out=tmp_path / "one")
    assert ranks.record["best_step"] == one.record["best_step"] > 0
    # sums over rows are taken rank by rank: 1e-7 per step, which Adam's first steps make larger
    for name, found in ranks.tensors.items():
        np.testing.assert_allclose(found, one.tensors[name], rtol=2e-4, atol=2e-5, err_msg=name)
    wide = read_tensor(bundle.dense["network.wide"])
    (tuned,) = (found for name, found in ranks.tensors.items() if name.endswith("network.wide"))
    assert not np.allclose(tuned, wide, rtol=0, atol=1e-3)
