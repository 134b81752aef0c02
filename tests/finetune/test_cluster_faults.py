"""Fine-tuning over ranks when something goes wrong: one clear error, nothing left, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert.bundle import open_bundle
from dmt_convert.placement import Cluster, plan_towers
from support.cluster.recipe_runs import COMMON
from support.paths import REPOSITORY

pytestmark = pytest.mark.slow

Tune = Callable[..., Any]
KILLED = -9
SETTINGS = ("--table-lr", 0.1, "--warmup-steps", 3, "--clip-norm", 0.3)


def assert_told_once(found: Any, *words: str, seconds: float = 20) -> str:
    """One error over all ranks, in three parts, in bounded time; returns it."""
    ranks = found.attempts[-1]
    errors = "".join(rank["stderr"] for rank in ranks)
    assert errors.count("error: ") == 1, errors
    assert errors.count("\nexpected: ") == errors.count("\ntry: ") == 1, errors
    assert "Traceback" not in errors
    assert all(word in errors for word in words), errors
    assert all(rank["code"] != 0 for rank in ranks)
    assert found.seconds < seconds
    return errors


def assert_nothing_there(found: Any) -> None:
    """Neither the bundle nor a half of one."""
    names = {path.name for path in found.out.parent.iterdir()}
    assert names <= {"new.checkpoints"}
    partial = list(found.out.parent.rglob("*partial*"))
    assert len(partial) <= 1, "at most the checkpoint that was being written"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tune_in: Tune) -> Any:
    """Nothing interrupted it."""
    return tune_in(tmp_path_factory.mktemp("whole"), "2x1", *SETTINGS)


@pytest.mark.parametrize(
    ("rank", "moment", "count"),
    [
        pytest.param(1, "sums", 1, marks=pytest.mark.exhaustive),
        pytest.param(0, "step", 2, marks=pytest.mark.exhaustive),
        (1, "step", 8),
        pytest.param(0, "measure", 4, marks=pytest.mark.exhaustive),
        pytest.param(1, "tensors written", 2, marks=pytest.mark.exhaustive),
        pytest.param(0, "before the name", 3, marks=pytest.mark.exhaustive),
        pytest.param(0, "old one removed", 1, marks=pytest.mark.exhaustive),
        pytest.param(0, "half written", 1, marks=pytest.mark.exhaustive),
        pytest.param(0, "written", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_lost_rank_changes_nothing(tune, whole, rank, moment, count) -> None:
    fault = {"rank": rank, "moment": moment, "time": count}
    found = tune("2x1", *SETTINGS, faults=[fault], restarts=1)
    assert [ranks[rank]["code"] for ranks in found.attempts] == [KILLED, 0]
    assert found.files == whole.files
    assert {path.name for path in found.out.parent.iterdir()} == {"new", "new.checkpoints"}


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("terminate", "SIGTERM"),
        pytest.param("user signal", "SIGUSR1", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_to_one_rank_leaves_a_checkpoint_of_all(tune, whole, act, told) -> None:
    """Schedulers that take a machine back signal some process, and kill soon after."""
    fault = {"rank": 1, "moment": "step", "time": 7, "act": act}
    rare = ("--checkpoint-every", 1000, "--eval-every", 16)
    found = tune("2x1", *SETTINGS, *rare, faults=[fault], ends=False)
    assert [rank["code"] for rank in found.attempts[-1]] == [130, 130]
    errors = [rank["stderr"] for rank in found.attempts[-1]]
    step = 8  # one after the signal: ranks agree while they take the next step
    assert f"error: stopped by {told} after step {step}; its checkpoint is in " in errors[1]
    assert f"stopped by a signal to another rank after step {step}" in errors[0]
    assert all("--resume" in error for error in errors)
    folder = found.out.parent / "new.checkpoints"
    assert [path.name for path in folder.glob("step*")] == [f"step_{step:09d}"]
    assert not found.out.exists()
    resumed = tune("2x1", *SETTINGS, *rare, "--resume")
    assert f"going on from the checkpoint of step {step}\n" in resumed.printed
    assert resumed.files == tune("2x1", *SETTINGS, *rare, name="b").files


def test_checkpoints_are_written_by_the_clock(tune) -> None:
    """As they are by steps; that they are written changes no bit of the result."""
    by_clock = ("--eval-every", 16, "--checkpoint-minutes", 1e-9)
    (place,) = [i for i, option in enumerate(COMMON) if option == "--checkpoint-every"]
    found = tune("2x1", *SETTINGS, *by_clock, "--keep-checkpoints", 100, without=place)
    folder = found.out.parent / "new.checkpoints"
    assert len(list(folder.glob("step*"))) >= 2  # beside that of the last step
    plain = tune("2x1", *SETTINGS, "--eval-every", 16, "--checkpoint-every", 99, name="b")
    assert found.tensors.keys() == plain.tensors.keys()
    assert found.record["history"] == plain.record["history"]


def flip_rows(folder: Path, rows: Path, name: str) -> Path:
    """Copy rows; one label of a file is another one."""
    shutil.copytree(rows, folder)
    arrays = dict(np.load(rows / f"{name}.npz"))
    arrays["label"][100] ^= 1
    np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize(("name", "told"), [("train", "training"), ("valid", "validation")])
def test_other_rows_are_refused_on_resume(tune, tmp_path, cluster_rows, name, told) -> None:
    """As many of them: only their content differs."""
    found = tune("1x1", "--max-steps", 4)
    shutil.rmtree(found.out)
    other = flip_rows(tmp_path / "other", cluster_rows, name)
    refused = tune("1x1", "--max-steps", 6, "--resume", data=other, ends=False)
    errors = assert_told_once(refused, "is of another training", "start anew")
    assert f"digest of the {told} rows" in errors
    assert errors.count("digest of") == 1
    again = Path(shutil.copytree(cluster_rows, tmp_path / "copied"))
    resumed = tune("1x1", "--max-steps", 6, "--resume", data=again, notes=None)
    assert "going on from the checkpoint of step 4\n" in resumed.printed
    assert resumed.record["notes"] == ["from step 4 on with other settings: max_steps 6 (4 before)"]


def test_a_damaged_best_state_is_replaced_by_what_is_left(tune, tmp_path) -> None:
    """It is found when training goes on, not when its time is spent; and no bit of it is used."""
    first = tune("1x2", *SETTINGS, "--max-steps", 8)
    shutil.rmtree(first.out)
    worse = ("--table-lr", 3, "--dense-lr", 0.3, "--lr-decay", "constant", "--resume")
    second = tune("1x2", *worse, "--max-steps", 15, notes=None)
    best = second.record["best_step"]
    assert 0 < best <= 8
    (whole,) = (tmp_path / "a/new.checkpoints").glob(f"step*{best}")
    path = whole / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    shutil.rmtree(second.out)
    third = tune("1x2", *worse, "--max-steps", 15, notes=None)
    settings, note = third.record["notes"][:2]
    assert "table_lr 3.0 (0.1 before)" in settings  # of the resumption before; it stays
    assert "__1_0.distcp has other bytes" in note
    assert f"{whole.name}-damaged" in note
    assert whole.with_name(f"{whole.name}-damaged").is_dir()
    assert third.record["best_step"] in (0, 15)
    steps = [found["step"] for found in third.record["history"]]
    assert steps[-2:] == [15, 15]  # measured anew


def test_bits_that_flip_in_the_bundle_are_refused(tune, tmp_path, wide) -> None:
    """By the rank that reads them; fresh digests are never written over damage."""
    bundle = Path(shutil.copytree(wide, tmp_path / "flipped"))
    for path in sorted((bundle / "weights").glob("tower*")):
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(data)
    found = tune("1x2", bundle=bundle, ends=False)
    assert_told_once(found, str(bundle))
    assert_nothing_there(found)


@pytest.mark.exhaustive
def test_without_restarts_the_loss_is_said(tune) -> None:
    found = tune("1x2", faults=[{"rank": 1, "moment": "step", "time": 6}], ends=False)
    assert_told_once(found, "another rank was lost", "--resume")
    assert_nothing_there(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rank", "moment"), [(1, "step"), (0, "half written")])
def test_a_rank_that_stalls_is_given_up(tune, rank, moment) -> None:
    fault = {"rank": rank, "moment": moment, "time": 1, "act": "stop"}
    found = tune("1x2", "--timeout", 2, faults=[fault], ends=False)
    assert_told_once(found, "did not answer within 2 s")
    assert not found.out.exists()


@pytest.mark.exhaustive
def test_writing_may_take_longer_than_ranks_wait(tune) -> None:
    fault = {"rank": 0, "moment": "half written", "act": "slow"}
    found = tune("1x2", "--timeout", 3, "--max-steps", 2, faults=[fault])
    assert open_bundle(found.out)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_full_disk_is_said(tune, rank) -> None:
    fault = {"rank": rank, "moment": "step", "time": 4, "act": "full disk"}
    found = tune("1x2", faults=[fault], ends=False)
    assert_told_once(found, "is full", f"on rank {rank}")
    assert not list(found.out.parent.rglob("*partial*"))


def spoil_rows(folder: Path, rows: Path, **changes: Any) -> Path:
    """Copy rows with some arrays changed."""
    shutil.copytree(rows, folder, copy_function=shutil.copy)
    arrays = dict(np.load(rows / "train.npz"))
    for name, change in changes.items():
        arrays[name] = change(arrays[name].copy())
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "train.npz", **kept)
    return folder


def put(place: Any, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[place] = value
        return array

    return change


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"sparse": put((500, 0), 9)}, "id 9"),
        ({"dense": put((100, 1), np.nan)}, "nan"),
        ({"label": lambda array: None}, "has no labels"),
        ({key: lambda array: array[:0] for key in ("sparse", "dense", "label")}, "no rows"),
    ],
)
def test_bad_rows_are_said(tune, tmp_path, cluster_rows, changes, found) -> None:
    data = spoil_rows(tmp_path / "bad", cluster_rows, **changes)
    done = tune("1x2", "--json", data=data, ends=False)
    errors = assert_told_once(done, found)
    (document,) = (rank["stdout"] for rank in done.attempts[-1] if rank["stdout"])
    assert errors.startswith(f"error: {json.loads(document)['found']}\n")
    assert 3 in {rank["code"] for rank in done.attempts[-1]}
    assert_nothing_there(done)


@pytest.mark.exhaustive
def test_what_does_not_fit_is_said(tune, tmp_path, wide) -> None:
    model = open_bundle(wide).manifest.model
    plan = plan_towers(
        model.flat,
        model.assignment,
        Cluster(hosts=2, ranks_per_host=2),
        tower_bytes=model.tower_bytes,
    )
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    damaged = Path(shutil.copytree(wide, tmp_path / "damaged"))
    (damaged / "dmt.json").write_text("{}")
    for cluster, options, found in (
        ("1x2", {"options": ("--plan", tmp_path / "plan.json")}, "a plan for 2 hosts x 2 ranks"),
        ("3x1", {}, "2 towers on 3 hosts"),
        ("1x2", {"bundle": tmp_path / "no"}, "does not exist"),
        ("1x2", {"bundle": damaged}, "dmt.json"),
        ("1x2", {"options": ("--table-optimizer", "adam")}, "adam over ranks"),
        ("1x2", {"options": ("--dense-lr", 1e30, "--table-lr", 1e30)}, "diverged"),
    ):
        more = options.pop("options", ())
        done = tune(cluster, *more, name=found[:6], ends=False, **options)
        hosts = int(cluster[0])
        if hosts == 1:
            assert_told_once(done, found)
        else:  # one rank of every host
            assert [found in rank["stderr"] for rank in done.attempts[-1]] == [True] * hosts
        assert_nothing_there(done)


@pytest.mark.exhaustive
def test_checkpoints_and_bundles_are_not_lost(tune, whole, tmp_path) -> None:
    """What is there stays, until it is said what is to become of it; also when ranks restart."""
    shutil.copytree(whole.out.parent, tmp_path / "a")
    checkpoints = tmp_path / "a" / "new.checkpoints"
    there = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    for options, found in (
        ((), "new exists"),
        (("--resume",), "new exists"),
        (("--force", "--resume", "--seed", 5), "is of another training"),
    ):
        done = tune("1x2", *SETTINGS, *options, restarts=1, ends=False)
        assert_told_once(done, found)
        assert len(done.attempts) == 2
        assert done.files == whole.files
    shutil.rmtree(tmp_path / "a" / "new")
    done = tune("1x2", *SETTINGS, restarts=1, ends=False)
    assert_told_once(done, "holds checkpoints of a training, up to step 16", "--resume")
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("step*/*")}.items() <= (
        there.items()
    )
    again = tune("2x1", *SETTINGS, "--resume")
    assert "from the checkpoint of step 16\n" in again.printed
    assert again.files == whole.files
    anew = tune("2x1", *SETTINGS, "--force", "--seed", 5)
    assert "going on" not in anew.printed and anew.files != whole.files


def start(arguments: tuple[object, ...]) -> subprocess.Popen[str]:
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def find_ranks(token: Path) -> dict[int, int]:
    """Rank -> process, of all processes that have `token` among their arguments and are ranks."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            environment = dict(
                line.split(b"=", 1)
                for line in (process / "environ").read_bytes().split(b"\0")
                if b"=" in line
            )
        except OSError:
            continue
        if str(token).encode() in arguments and b"LOCAL_RANK" in environment:
            found[int(environment[b"RANK"])] = int(process.name)
    return found


def kill_rank(rank: int, out: Path, *, after: Path) -> dict[int, int]:
    """Kill a rank as soon as a file is there; returns the processes of all ranks."""
    end = time.monotonic() + 60
    while not after.exists():
        assert time.monotonic() < end, "training does not start"
        time.sleep(0.02)
    ranks = find_ranks(out)
    os.kill(ranks[rank], signal.SIGKILL)
    return ranks


@pytest.mark.exhaustive
def test_torchrun_starts_lost_ranks_again(tune, tmp_path, wide, cluster_rows):
    more = (*COMMON, *SETTINGS, "--max-steps", 40)
    whole = tune("1x2", *SETTINGS, "--max-steps", 40, name="whole")
    out = tmp_path / "b" / "new"
    out.parent.mkdir()
    recipe = REPOSITORY / "recipes" / "finetune_dmt.py"
    process = start(
        (
            *("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1),
            *(recipe, "--bundle", wide, "--data", cluster_rows, "--out", out, *more),
        ),
    )
    try:
        kill_rank(1, out, after=out.parent / "new.checkpoints" / "step_000000009")
        stdout, stderr = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert stdout.count("going on from the checkpoint of step ") == 1
    assert stderr.count("error: ") == stderr.count("another rank was lost") == 1
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == whole.files
    assert find_ranks(out) == {}


@pytest.mark.exhaustive
def test_dmt_finetune_says_which_rank_was_lost(tmp_path, wide, cluster_rows):
    out = tmp_path / "new"
    process = start(
        (
            *("dmt_convert.cli.main", "finetune", wide, "--data", cluster_rows, "--out", out),
            *("--nproc", 2, "--json", "--", *COMMON, "--max-steps", 5000, "--patience", 5000),
        ),
    )
    try:
        kill_rank(0, out, after=tmp_path / "new.checkpoints" / "step_000000006")
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert json.loads(stdout)["found"] == "rank 0 was killed (SIGKILL)"
    assert stderr.startswith("error: rank 0 was killed (SIGKILL)\nexpected: ")
    assert stderr.count("\n") == 3
    assert find_ranks(out) == {} and not out.exists()
