"""`dmt finetune` starts the recipe on ranks, and says one thing of what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.bundle import is_bundle
from support.commands import run_dmt

Call = Callable[..., Any]


@pytest.mark.slow
def test_a_bundle_is_tuned_beside_the_old_one(
    tmp_path: Path, compressed: Path, click_data: Path
) -> None:
    bundle = tmp_path / "ckpt-dmt2"
    bundle.symlink_to(compressed)
    run = run_dmt("finetune", bundle, "--data", click_data, "--max-steps", 2, "--json")
    assert (run.code, run.stderr) == (0, "")
    value = json.loads(run.stdout)
    assert value["bundle"] == str(tmp_path / "ckpt-dmt2-tuned")
    assert value["steps"] == 2
    assert is_bundle(tmp_path / "ckpt-dmt2-tuned")


@pytest.mark.slow
def test_people_see_what_the_recipe_prints(
    tmp_path: Path, compressed: Path, click_data: Path
) -> None:
    out = tmp_path / "tuned"
    options = ("--data", click_data, "--out", out, "--batch-size", 100, "--", "--max-steps", 3)
    run = run_dmt("finetune", compressed, *options)
    assert run.code == 0, run.stderr
    assert "at most 3 steps of 100 rows" in run.stdout
    assert f"wrote {out}" in run.stdout
    assert "torchrun" not in run.stderr
    assert "OMP_NUM_THREADS" not in run.stderr


@pytest.mark.slow
def test_a_refusal_of_the_recipe_is_one_error(tmp_path: Path, compressed: Path) -> None:
    arguments = ("finetune", compressed, "--data", tmp_path / "gone", "--out", tmp_path / "out")
    run = run_dmt(*arguments, "--max-restarts", 2, "--json")
    assert run.code == 3
    assert run.stderr.count("error: ") == 1
    assert run.stderr.startswith(f"error: {tmp_path / 'gone'} does not exist")
    assert "Traceback" not in run.stderr
    value = json.loads(run.stdout)
    assert value["found"] == f"{tmp_path / 'gone'} does not exist"


def test_a_place_without_a_bundle_is_refused_before_anything_starts(
    tmp_path: Path, flat: Path, call_dmt: Call
) -> None:
    for source in (tmp_path / "gone", flat):
        run = call_dmt("finetune", source, "--data", tmp_path)
        assert run.code == 3
        assert run.stderr.startswith(f"error: {source} ")


def test_a_second_host_needs_a_place_to_meet(compressed: Path, call_dmt: Call) -> None:
    run = call_dmt("finetune", compressed, "--data", "clicks", "--nnodes", 2)
    assert run.code == 2
    assert "--nnodes 2 needs --rdzv-endpoint" in run.stderr


def test_what_is_no_option_is_a_usage_error(compressed: Path, call_dmt: Call) -> None:
    for extra in ("typo", "--typo"):
        run = call_dmt("finetune", compressed, "--data", "clicks", extra)
        assert run.code == 2
        assert extra in run.stderr


def test_a_dry_run_prints_what_torchrun_would_get(compressed: Path, call_dmt: Call) -> None:
    options = ("--data", "my clicks", "--nproc", 2, "--batch-size", 3, "--force", "--quiet")
    run = call_dmt("finetune", compressed, *options, "--dry-run", "--", "--new", 1)
    assert run.code == 0
    assert " -m torch.distributed.run --nnodes=1 --standalone " in run.stdout
    assert " -m dmt_convert.recipes.finetune_dmt " in run.stdout
    assert "--data 'my clicks' " in run.stdout
    assert run.stdout.endswith(f"--bundle {compressed} --out {compressed}-tuned --new 1\n")
    listed = json.loads(call_dmt("finetune", compressed, *options, "--dry-run", "--json").stdout)
    assert {"--force", "--quiet", "--json"} <= set(listed["command"])
