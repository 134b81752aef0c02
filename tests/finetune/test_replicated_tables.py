"""Fine-tuning a bundle with tables on every rank: resumed on fewer ranks, and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import open_bundle
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.cluster import choose_plan
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.errors import PlanError
from dmt_convert.placement import Cluster, plan_model
from dmt_convert.recipes.finetune_dmt import main
from support.cluster.recipe_runs import COMMON, Tuned, make_wide

HARD = ("--warmup-steps", 3, "--lr-decay", "cosine", "--clip-norm", 0.3, "--table-lr", 0.1)
# as in `test_cluster_training`: sums over rows are taken rank by rank, and Adam enlarges them
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
SMALL = {"tower_module": "passthrough", "replicate": "8", "dim": 10}


def sums_of_one_table(state: dict[str, Any]) -> None:
    """Let the checkpoint have sums of the last table, which every rank will hold."""
    name = [name for name in state if "embedding_bags" in name][-1]
    model = dict(state)
    sums = torch.rand(len(model[name]), generator=torch.Generator().manual_seed(3))
    state.clear()
    state.update(
        model=model, optimizer={"state": {name: {f"{name.split('.')[-2]}.momentum1": sums}}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rowwise-adagrad", "sgd"])
def test_it_goes_on_with_fewer_ranks_as_in_one_process(
    tune: Callable[..., Tuned], cluster_rows: Path, tmp_path: Path, kind: str
) -> None:
    """Killed on 2x2, ended on 2x1; then the new bundle has the files of the old one."""
    edit = sums_of_one_table if kind == "rowwise-adagrad" else None
    bundle = make_wide(tmp_path, edit=edit, **SMALL)
    options = (*HARD, "--table-optimizer", kind, "--table-lr", 1.0 if kind == "sgd" else 0.1)
    die = {"moment": "step", "rank": 0, "time": 8}
    stopped = tune("2x2", *options, bundle=bundle, faults=[die], ends=False)
    (newest,) = stopped.out.parent.glob("*/*6")
    saved = {info.path: info.shape for info in open_checkpoint(newest).tensors}
    tables = {name for name in saved if name.startswith("model.replicated.embedding_bags.")}
    assert sorted(saved[name] for name in tables) == [(6, 10), (7, 10)]
    sums = {n for n in saved if n.startswith("table_optimizer.replicated.")}
    assert sorted(saved[n] for n in sums) == ([] if kind == "sgd" else [(6,), (7,)])
    last = tune("2x1", *options, "--resume", bundle=bundle, notes=None)
    assert "from the checkpoint of step 6\n" in last.printed
    alone = Tuned(out=tmp_path / "alone")
    ours = ("--bundle", bundle, "--data", cluster_rows, "--out", alone.out, *COMMON, "--quiet")
    main([str(argument) for argument in (*ours, *options)])
    mine, theirs, start = last.tensors, alone.tensors, Tuned(out=bundle).tensors
    assert mine.keys() == theirs.keys()
    for name, found in mine.items():
        np.testing.assert_allclose(found, theirs[name], **CLOSE, err_msg=name)
    names = [f"3 {name.rpartition(' ')[2]}" for name in start if name.startswith("3 ")]
    assert len(names) == 2 and all(abs(mine[n] - start[n]).max() > 1e-3 for n in names)
    weights = {path.name for path in (bundle / "weights").iterdir()}
    assert weights <= {path.name for path in (last.out / "weights").iterdir()}


def layout(hosts: int) -> RankLayout:
    return RankLayout(rank=0, local_rank=0, world_size=hosts, ranks_per_host=1, backend="gloo")


def test_a_plan_is_chosen_and_others_are_refused(tmp_path: Path) -> None:
    bundle = open_bundle(make_wide(tmp_path, **SMALL))
    model = bundle.manifest.model
    assert choose_plan(bundle, layout(2), None).tower_hosts == ((0,), (1,), ())
    cluster = Cluster(hosts=1, ranks_per_host=1)
    together = plan_model(
        replace(model, towers=tuple(replace(t, everywhere=False) for t in model.towers)), cluster
    )
    with pytest.raises(PlanError) as error:
        choose_plan(bundle, layout(1), together)
    assert "other towers are on every rank" in str(error.value)
    assert json.dumps(plan_model(model, cluster).to_json())
