"""Fine-tuning over ranks: what one process gives, the same after any interruption, on any cluster.

Ranks are forked from one process that has torch and torchrec, see `cluster_server`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.checkpoint import read_tensor
from dmt_convert.convert import ConvertConfig, convert_checkpoint
from dmt_convert.partition import PartitionConfig
from dmt_convert.plan import Cluster, TowerPlan, plan_towers
from dmt_convert.recipes.finetune_dmt import main

TABLES = (7, 400, 9, 6)
# the last batch of a pass has 10 rows: four ranks get 3, 3, 3 and 1
COMMON = ("--batch-size", 74, "--eval-every", 4, "--checkpoint-every", 3, "--max-steps", 16)
HARD = ("--warmup-steps", 3, "--lr-decay", "cosine", "--clip-norm", 0.3, "--table-lr", 0.1)
# sums over rows are taken rank by rank: 1e-7 per step, which Adam's first steps make larger
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
CLOSE_LOSS = 2e-6


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a run."""

    out: Path
    attempts: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.out)

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = self.bundle.manifest.initialisation["finetune"]
        return found

    @property
    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }

    @property
    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        bundle = self.bundle
        groups = [bundle.dense, *bundle.towers, *bundle.accumulator_files.values()]
        return {
            f"{t} {name}": read_tensor(info).astype(np.float32)
            for t, tensors in enumerate(groups)
            for name, info in tensors.items()
        }

    @property
    def printed(self) -> str:
        return "".join(rank["stdout"] for ranks in self.attempts for rank in ranks)


Tune = Callable[..., Tuned]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, make_rows: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    make_rows(folder, "train", 602, seed=0, tables=TABLES)
    make_rows(folder, "valid", 203, seed=1, tables=TABLES)
    return folder


@pytest.fixture(scope="session")
def make_wide(
    tmp_path_factory: pytest.TempPathFactory, make_flat: Callable[..., Path]
) -> Callable[..., Path]:
    """A bundle of two towers, tables wide enough to be cut into columns."""

    def make(*, edit: Callable[[dict[str, Any]], object] | None = None, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("wide")
        source = make_flat(folder / "ckpt.pt", rows=TABLES, dim=64, edit=edit)
        config = ConvertConfig(
            partition=PartitionConfig(num_towers=2, strategy="round-robin"), **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt_convert.sampling.sample.sample_size", lambda spec: 1024)
            return convert_checkpoint(source, folder / "wide", config=config).bundle.path

    return make


@pytest.fixture(scope="session")
def wide(make_wide: Callable[..., Path]) -> Path:
    return make_wide(compression=4)


@pytest.fixture
def tune(tmp_path: Path, wide: Path, rows: Path, cluster_jobs: Callable[..., Any]) -> Tune:
    """Run the recipe on HOSTS x RANKS."""

    def run(
        cluster: str,
        *options: object,
        name: str = "a",
        bundle: Path = wide,
        data: Path = rows,
        ends: bool = True,
        notes: str = "",
        **job: Any,
    ) -> Tuned:
        hosts, ranks = map(int, cluster.split("x"))
        out = tmp_path / name / "new"
        out.parent.mkdir(exist_ok=True)
        common = ("--bundle", bundle, "--data", data, "--out", out, *COMMON)
        arguments = [str(argument) for argument in (*common, *options)]
        done = cluster_jobs(hosts=hosts, ranks=ranks, arguments=arguments, **job)
        last = done["attempts"][-1]
        if ends:
            assert [rank["code"] for rank in last] == [0] * (hosts * ranks), last
            assert {rank["stderr"] for rank in last} <= {"", notes}
        return Tuned(out=out, attempts=done["attempts"])

    return run


@pytest.fixture
def tune_alone(tmp_path: Path, wide: Path, rows: Path) -> Tune:
    """Run the recipe in this process."""

    def run(*options: object, bundle: Path = wide) -> Tuned:
        out = tmp_path / "alone" / "new"
        out.parent.mkdir()
        common = ("--bundle", bundle, "--data", rows, "--out", out, *COMMON, "--quiet")
        torch.manual_seed(0)
        main([str(argument) for argument in (*common, *options)])
        return Tuned(out=out)

    return run


def assert_alike(one: Tuned, other: Tuned, close: dict[str, float] = CLOSE) -> None:
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
        ("2x2", HARD),
        ("2x1", ("--initial-accumulator", 0.01)),
        ("1x2", ("--table-optimizer", "sgd", "--dense-optimizer", "sgd", "--table-lr", 0.5)),
        ("2x1", ("--table-optimizer", "adagrad", "--dense-lr", 0.01, "--no-prefetch")),
        ("2x1", ("--table-lr", 0, "--dense-lr", 0.01)),
        ("2x1", ("--dense-lr", 0)),
    ],
)
def test_ranks_give_what_one_process_gives(tune, tune_alone, cluster, options) -> None:
    assert_alike(tune(cluster, *options), tune_alone(*options))


def test_carried_sums_are_gone_on_from_as_in_one_process(tune, tune_alone, make_wide) -> None:
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

    bundle = make_wide(compression=4, edit=with_sums)
    assert len(open_bundle(bundle).accumulators) == 2
    note = "note: Adagrad goes on from the accumulators of 2 tables\n"
    assert_alike(tune("2x2", *HARD, bundle=bundle, notes=note), tune_alone(*HARD, bundle=bundle))


def write_plan(path: Path, bundle: Path, cluster: Cluster) -> tuple[Path, set[str]]:
    """Plan for a cluster; returns the file, and how tables are cut."""
    model = open_bundle(bundle).manifest.model
    plan = plan_towers(model.flat, model.assignment, cluster, tower_widths=model.tower_widths)
    path.write_text(json.dumps(plan.to_json()))
    kinds = {f"{placement.sharding_type} {len(placement.shards)}" for placement in plan.tables}
    assert isinstance(plan, TowerPlan)
    return path, kinds


def test_another_cluster_goes_on_by_resharding(tune, wide, tmp_path) -> None:
    """Killed on 4x2, tables cut by rows; goes on on 2x2, is killed, and ends on 1x1."""
    whole = tune("2x2", *HARD, name="whole")
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


def test_column_shards_are_joined_and_cut(tune, wide, tmp_path) -> None:
    """Row-wise Adagrad's sums differ between column shards: they go on from their mean."""
    plan, kinds = write_plan(
        tmp_path / "cw.json", wide, Cluster(hosts=2, ranks_per_host=2, hbm_bytes=75_000)
    )
    assert "table_column_wise 2" in kinds
    whole = tune("2x2", *HARD, name="whole")
    assert_alike(tune("2x2", *HARD, "--plan", plan), whole, {"rtol": 0.1, "atol": 0.1})
    die = {"moment": "step", "rank": 0, "time": 8}
    tune("2x2", *HARD, "--plan", plan, name="b", faults=[die], ends=False)
    joined = tune("2x1", *HARD, "--resume", name="b")
    assert_alike(joined, whole, {"rtol": 0.1, "atol": 0.1})
    tune("2x1", *HARD, name="c", faults=[die], ends=False)
    cut = tune("2x2", *HARD, "--plan", plan, "--resume", name="c")
    assert_alike(cut, whole, {"rtol": 0.1, "atol": 0.1})
