"""Fine-tuning over ranks: what one process gives, the same after any interruption, on any cluster.

Ranks are forked from one process that has torch and torchrec, see `cluster_server`.
"""

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
from dmt_convert.placement import Cluster, TowerPlan, plan_towers
from dmt_convert.recipes.finetune_dmt import main
from support.cluster.recipe_runs import COMMON, Tuned, make_wide

pytestmark = pytest.mark.slow

HARD = ("--warmup-steps", 3, "--lr-decay", "cosine", "--clip-norm", 0.3, "--table-lr", 0.1)
# sums over rows are taken rank by rank: 1e-7 per step, which Adam's first steps make larger
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
CLOSE_LOSS = 2e-6


Tune = Callable[..., Any]


@pytest.fixture
def tune_alone(tmp_path: Path, wide: Path, cluster_rows: Path) -> Tune:
    """Run the recipe in this process."""

    def run(*options: object, bundle: Path = wide) -> Any:
        out = tmp_path / "alone" / "new"
        out.parent.mkdir()
        ours = ("--bundle", bundle, "--data", cluster_rows, "--out", out, *COMMON, "--quiet")
        torch.manual_seed(0)
        main([str(argument) for argument in (*ours, *options)])
        return Tuned(out=out)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tune_in: Tune) -> Any:
    """Nothing interrupted it."""
    return tune_in(tmp_path_factory.mktemp("whole"), "2x2", *HARD)


def assert_alike(one: Any, other: Any, close: dict[str, float] = CLOSE) -> None:
    """The same evaluations and weights, but for sums in another order."""
    ours, theirs = one.record["history"], other.record["history"]
    assert [e["step"] for e in ours] == [e["step"] for e in theirs]
    for key in ("log_loss", "train_loss", "ne"):
        a, b = ([e[key] for e in history if e[key] is not None] for history in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE_LOSS * close["atol"] / CLOSE["atol"])
    assert one.record["best_step"] == other.record["best_step"] > 0
    ours, theirs = one.tensors, other.tensors
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        np.testing.assert_allclose(found, theirs[name], **close, err_msg=name)


@pytest.mark.parametrize(
    ("cluster", "options"),
    [
        ("1x1", HARD),
        pytest.param("2x1", ("--initial-accumulator", 0.01), marks=pytest.mark.exhaustive),
        ("1x2", ("--table-optimizer", "sgd", "--dense-optimizer", "sgd", "--table-lr", 0.5)),
        ("2x1", ("--table-optimizer", "adagrad", "--dense-lr", 0.01, "--no-prefetch")),
        pytest.param("2x1", ("--table-lr", 0, "--dense-lr", 0.01), marks=pytest.mark.exhaustive),
        pytest.param("2x1", ("--dense-lr", 0), marks=pytest.mark.exhaustive),
    ],
)
def test_ranks_give_what_one_process_gives(tune, tune_alone, cluster, options) -> None:
    assert_alike(tune(cluster, *options), tune_alone(*options))


def test_four_ranks_give_what_one_process_gives(whole, tune_alone) -> None:
    assert_alike(whole, tune_alone(*HARD))


@pytest.mark.exhaustive
def test_carried_sums_are_gone_on_from_as_in_one_process(tune, tune_alone, tmp_path) -> None:
    """Of two tables the bundle has sums; the others' are measured."""

    def with_sums(state: dict[str, Any]) -> None:
        names = [name for name in state if "embedding_bags" in name]
        model = dict(state)
        generator = torch.Generator().manual_seed(3)
        sums = {
            name: {
                f"{name.split('.')[-2]}.momentum1": torch.rand(
                    len(model[name]), generator=generator
                )
            }
            for name in names[:2]
        }
        state.clear()
        state.update(model=model, optimizer={"state": sums})

    bundle = make_wide(tmp_path, c=1, compression=4, edit=with_sums)
    assert len(open_bundle(bundle).accumulators) == 2
    note = "note: Adagrad goes on from the accumulators of 2 tables\n"
    assert_alike(tune("2x2", *HARD, bundle=bundle, notes=note), tune_alone(*HARD, bundle=bundle))


def write_plan(path: Path, bundle: Path, cluster: Cluster) -> tuple[Path, set[str]]:
    """Plan for a cluster; returns the file, and how tables are cut."""
    model = open_bundle(bundle).manifest.model
    plan = plan_towers(model.flat, model.assignment, cluster, tower_bytes=model.tower_bytes)
    path.write_text(json.dumps(plan.to_json()))
    kinds = {f"{placement.sharding_type} {len(placement.shards)}" for placement in plan.tables}
    assert isinstance(plan, TowerPlan)
    return path, kinds


@pytest.mark.exhaustive
def test_another_cluster_goes_on_by_resharding(tune, whole, wide, tmp_path) -> None:
    """Killed on 4x2, tables cut by rows; goes on on 2x2, is killed, and ends on 1x1."""
    small, kinds = write_plan(
        tmp_path / "rw.json", wide, Cluster(hosts=4, ranks_per_host=2, hbm_bytes=50_000)
    )
    assert "table_row_wise 4" in kinds
    die = {"moment": "step", "rank": 0}
    tune("4x2", *HARD, "--plan", small, faults=[{**die, "time": 8}], ends=False)
    tune("2x2", *HARD, "--resume", faults=[{**die, "time": 7}], ends=False)
    last = tune("1x1", *HARD, "--resume")
    assert "from the checkpoint of step 12\n" in last.printed
    assert_alike(last, whole)


@pytest.mark.parametrize(
    "kind",
    [
        "rowwise-adagrad",
        pytest.param("adagrad", marks=pytest.mark.exhaustive),
        pytest.param("sgd", marks=pytest.mark.exhaustive),
    ],
)
def test_tables_of_any_width_are_saved_as_they_are(tune, tune_alone, tmp_path, kind) -> None:
    """Killed on 2x1, ended on 1x2; of the columns of zeros nothing is in the checkpoints."""
    bundle = make_wide(tmp_path, c=1, compression=1, dim=10)
    options = (*HARD, "--table-optimizer", kind)
    die = {"moment": "step", "rank": 0, "time": 8}
    stopped = tune("2x1", *options, bundle=bundle, faults=[die], ends=False)
    (newest,) = stopped.out.parent.glob("*/*6")
    shapes = [i.shape for i in open_checkpoint(newest).tensors if "embedding_bags" in i.name]
    assert {shape[1] for shape in shapes if len(shape) == 2} == {10}
    last = tune("1x2", *options, "--resume", bundle=bundle)
    assert "from the checkpoint of step 6\n" in last.printed
    assert_alike(last, tune_alone(*options, bundle=bundle))


@pytest.mark.exhaustive
def test_towers_may_change_hosts(tune, tune_alone, wide, tmp_path) -> None:
    """Checkpoints name towers by their index, not by the order of their hosts."""
    model = open_bundle(wide).manifest.model
    plan = plan_towers(
        model.flat,
        model.assignment,
        Cluster(hosts=2, ranks_per_host=1),
        tower_bytes=model.tower_bytes,
    )
    swapped = replace(
        plan,
        tower_hosts=plan.tower_hosts[::-1],
        tables=tuple(
            replace(t, shards=tuple(replace(s, rank=1 - s.rank) for s in t.shards))
            for t in plan.tables
        ),
        bytes_per_rank=plan.bytes_per_rank[::-1],
        lookups_per_rank=plan.lookups_per_rank[::-1],
    )
    (tmp_path / "swapped.json").write_text(json.dumps(swapped.to_json()))
    die = {"moment": "step", "rank": 0, "time": 8}
    tune("2x1", *HARD, faults=[die], ends=False)
    last = tune("2x1", *HARD, "--resume", "--plan", tmp_path / "swapped.json")
    assert_alike(last, tune_alone(*HARD))


@pytest.mark.exhaustive
def test_column_shards_are_joined_and_cut(tune, whole, wide, tmp_path) -> None:
    """Row-wise Adagrad's sums differ between column shards: they go on from their mean."""
    plan, kinds = write_plan(
        tmp_path / "cw.json", wide, Cluster(hosts=2, ranks_per_host=2, hbm_bytes=75_000)
    )
    assert "table_column_wise 2" in kinds
    assert_alike(tune("2x2", *HARD, "--plan", plan), whole, {"rtol": 0.1, "atol": 0.1})
    die = {"moment": "step", "rank": 0, "time": 8}
    tune("2x2", *HARD, "--plan", plan, name="b", faults=[die], ends=False)
    joined = tune("2x1", *HARD, "--resume", name="b")
    assert_alike(joined, whole, {"rtol": 0.1, "atol": 0.1})
    tune("2x1", *HARD, name="c", faults=[die], ends=False)
    cut = tune("2x2", *HARD, "--plan", plan, "--resume", name="c")
    assert_alike(cut, whole, {"rtol": 0.1, "atol": 0.1})


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [(), ("--async-checkpoints", "--no-prefetch")])
def test_a_killed_training_goes_on_to_the_same_bytes(tune, whole, more) -> None:
    """Once started again by torchrun, once by hand."""
    die = {"moment": "step", "rank": 3, "time": 12}
    again = tune("2x2", *HARD, *more, faults=[die], restarts=1)
    # what is written in the background may not be whole when the rank dies
    assert any(f"from the checkpoint of step {step}\n" in again.printed for step in (8, 9))
    assert_same(again, whole)
    stopped = tune("2x2", *HARD, *more, name="b", faults=[die | {"time": 6}], ends=False)
    assert not stopped.out.exists()
    by_hand = tune("2x2", *HARD, *more, "--resume", name="b")
    assert any(f"from the checkpoint of step {step}\n" in by_hand.printed for step in (3, 4))
    assert_same(by_hand, whole)


@pytest.mark.parametrize("cluster", [pytest.param("1x1", marks=pytest.mark.exhaustive), "2x1"])
def test_a_teacher_goes_on_to_the_same_bytes(tune, tmp_path, cluster) -> None:
    """The teacher is asked from the step on at which it was left, and never exchanged."""
    bundle = make_wide(tmp_path, c=1, compression=4)
    whole = tune(cluster, *HARD, bundle=bundle, name="whole")
    assert f"and from the flat model {tmp_path / 'ckpt.pt'}, weight 0.5" in whole.printed
    die = {"moment": "step", "rank": 0, "time": 8}
    tune(cluster, *HARD, bundle=bundle, faults=[die], ends=False)
    alone = tune(cluster, *HARD, "--resume", "--teacher", "none", bundle=bundle, ends=False)
    assert "teacher: 'sha256:" in alone.attempts[-1][0]["stderr"]
    resumed = tune(cluster, *HARD, "--resume", bundle=bundle)
    assert "from the checkpoint of step 6\n" in resumed.printed
    assert_same(resumed, whole)
    labels = tune(cluster, *HARD, "--teacher", "none", bundle=bundle, name="labels")
    assert labels.record["history"][-1] != whole.record["history"][-1]  # the check can fail


def assert_same(one: Any, other: Any) -> None:
    """The same bytes in all files, but for the settings that say how checkpoints are written."""
    ours, theirs = one.record, other.record
    assert ours["history"] == theirs["history"]
    if ours["settings"] == theirs["settings"]:
        assert one.files == other.files
    else:
        assert {n: b for n, b in one.files.items() if n.startswith("weights/")} == {
            n: b for n, b in other.files.items() if n.startswith("weights/")
        }


@pytest.mark.exhaustive
def test_what_is_written_is_what_was_measured(tune, tmp_path, call_dmt, cluster_rows) -> None:
    """fp16 tables; the best state is an earlier one, patience ends training."""
    bundle = make_wide(tmp_path, c=1, compression=4, dtype="fp16")
    found = tune(
        *("2x1", "--table-lr", 0.3, "--lr-decay", "constant", "--max-steps", 90),
        *("--patience", 3, "--eval-every", 2, "--json"),
        bundle=bundle,
    )
    said = json.loads(found.printed)
    steps = [evaluation["step"] for evaluation in said["history"]]
    assert 0 < said["best_step"] == steps[-1] - 6 < said["steps"] - 4 == steps[-1] - 4 < 86
    assert said["notes"] and "stored in fp16 again" in said["notes"][0]
    assert {info.dtype for tower in found.bundle.towers for info in tower.values()} >= {"fp16"}
    run = call_dmt("evaluate", found.out, "--data", cluster_rows / "valid.npz", "--json")
    measured = json.loads(run.stdout)
    for key in ("auc", "ne", "log_loss"):
        assert measured[key] == pytest.approx(said["after"][key], abs=1e-6)


@pytest.mark.exhaustive
def test_nothing_better_keeps_the_weights(tune, wide) -> None:
    found = tune("1x2", "--table-lr", 40, "--dense-lr", 0.5, "--max-steps", 8)
    assert "nothing beat the start" in found.printed and found.record["best_step"] == 0
    for name, path in ((p.name, p) for p in (wide / "weights").iterdir()):
        assert (found.out / "weights" / name).read_bytes() == path.read_bytes()
