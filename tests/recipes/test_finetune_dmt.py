"""The recipe: what it prints, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmt_convert import training
from dmt_convert.bundle import open_bundle
from dmt_convert.recipes.finetune_dmt import main
from dmt_convert.training import finetuned
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat
from support.paths import REPOSITORY, read_files


@pytest.fixture(autouse=True)
def few_threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `b` and the rows `rows.npz`."""
    folder = tmp_path_factory.mktemp("scene")
    source = make_flat(folder / "ckpt.pt")
    convert_quickly(source, folder / "b", report=True, partition="round-robin")
    write(folder / "rows")
    return folder


def write(path: Path, **changes: Any) -> Path:
    """Rows whose label is the parity of an id; `changes` replace arrays, None drops one."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, rows, 400) for rows in (7, 50, 11, 6)], axis=1)
    arrays = {
        "dense": rng.standard_normal((400, 5)).astype(np.float32),
        "sparse": ids.astype(np.int32),
        "label": (ids[:, 2] % 2).astype(np.uint8),
        **changes,
    }
    names = arrays.pop("names", [f"cat_{i}" for i in range(4)])
    np.savez(path / "rows.npz", **{k: v for k, v in arrays.items() if v is not None})
    schema = {"sparse_features": [{"name": name} for name in names]}
    (path / "schema.json").write_text(json.dumps(schema))
    return path / "rows.npz"


def call(*arguments: object) -> int:
    saved = signal.getsignal(signal.SIGTERM)
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, saved)
    return 0


@pytest.fixture
def tune(scene: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: object, data: Path = scene / "rows" / "rows.npz") -> int:
        common = ("--bundle", scene / "b", "--data", data, "--out", tmp_path / "new")
        return call(*common, "--batch-size", 32, *more)

    return run


def test_a_line_per_evaluation(tune, tmp_path, capsys) -> None:
    assert tune("--epochs", 3, "--eval-every", 6, "--table-lr", 0.1, "--patience", 50) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("one process on CPU; ")
    lines = printed.out.splitlines()
    steps = [int(line.split()[1].rstrip(":")) for line in lines if line.startswith("step ")]
    assert steps == [0, 6, 12, 18, 24, 30, 36]
    said = [line for line in lines if line.startswith("step ")]
    assert all("AUC" in line and "NE" in line for line in said)
    assert all(" +- " in line for line in said[1:]) and " +- " not in said[0]
    assert "the last 40 rows" in printed.err and "\r" not in printed.err + printed.out
    assert lines[-1] == f"wrote {tmp_path / 'new'}"
    record = open_bundle(tmp_path / "new").manifest.initialisation.finetune
    assert record.after.ne <= record.before.ne


def test_json_is_all_there_is_on_stdout(tune, capsys) -> None:
    assert tune("--max-steps", 4, "--json") == 0
    printed = capsys.readouterr()
    value = json.loads(printed.out)
    assert (value["steps"], len(value["history"])) == (4, 5)
    assert value["after"]["ne"] <= value["before"]["ne"]
    assert printed.err == ""


def test_quiet_prints_nothing(tune, capsys) -> None:
    assert tune("--max-steps", 2, "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_options_override_the_config(tune, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 7\nlr_decay: constant\nseed: 3\n")
    assert tune("--config", config, "--max-steps", 2, "--seed", 5) == 0
    settings = open_bundle(tmp_path / "new").manifest.initialisation.finetune.settings
    assert (settings["max_steps"], settings["epochs"], settings["seed"]) == (2, 1, 5)
    assert settings["lr_decay"] == "constant"


def test_two_runs_write_the_same_bytes(tune, tmp_path) -> None:
    assert tune("--max-steps", 6, "--quiet") == 0
    first = read_files(tmp_path / "new")
    assert tune("--max-steps", 6, "--quiet", "--force") == 0
    assert read_files(tmp_path / "new") == first


BAD_IDS = np.full((400, 4), 6, dtype=np.int32)
BAD_DENSE = np.full((400, 5), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "options", "found"),
    [
        ({"label": None}, (), "has no labels"),
        ({"sparse": BAD_IDS}, (), "id 6, but table"),
        ({"dense": BAD_DENSE}, (), "nan"),
        ({"label": np.full(400, 2)}, (), "label 2"),
        ({"names": ["cat_0", "b", "c", "d"]}, (), "lacks 3 of the model's 4 features"),
        ({"dense": np.zeros((400, 3), dtype=np.float32)}, (), "3 dense inputs"),
        ({}, ("--config", "no.yaml"), "no.yaml cannot be read"),
        ({}, ("--valid", "no.npz"), "no.npz does not exist"),
        ({}, ("--dense-lr", 1e30, "--epochs", 9), "diverged"),
    ],
)
def test_what_can_be_mended_is_said(tune, tmp_path, capsys, changes, options, found) -> None:
    data = write(tmp_path / "data", **changes)
    before = set(tmp_path.iterdir())
    assert tune(*options, "--json", data=data) == 3
    printed = capsys.readouterr()
    assert found in printed.err and "Traceback" not in printed.err
    assert "\nexpected: " in printed.err
    assert found in json.loads(printed.out)["found"]
    assert set(tmp_path.iterdir()) == before


def test_a_taken_target_is_refused_before_training(tune, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("kept")
    monkeypatch.setattr(training, "train", None)
    assert tune("--force") == 3
    assert "is not a bundle" in capsys.readouterr().err
    assert (tmp_path / "new" / "mine").read_text() == "kept"


@pytest.mark.parametrize("where", ["in_memory.measure_rows", "finetuned.render_documents"])
def test_an_interrupt_leaves_nothing(tune, tmp_path, capsys, monkeypatch, where) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dmt_convert.training.{where}", interrupt)
    assert tune("--max-steps", 2, "--json") == 130
    printed = capsys.readouterr()
    assert "nothing half-written" in printed.err
    assert json.loads(printed.out)["found"] == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_said(tune, tmp_path, capsys, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "weights")

    monkeypatch.setattr(finetuned, "render_documents", fail)
    assert tune("--max-steps", 2, "--quiet") == 3
    printed = capsys.readouterr()
    assert printed.err.startswith("error: weights: Permission denied\nexpected: ")
    assert list(tmp_path.iterdir()) == []


def test_a_bar_on_a_terminal_only(tune, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert tune("--max-steps", 3) == 0
    printed = capsys.readouterr()
    assert "Fine-tuning" in printed.err
    assert printed.out.count("\nstep ") == 4
    assert tune("--max-steps", 3, "--force", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_copy_runs_as_a_file(scene, tmp_path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0", "OMP_NUM_THREADS": "1"}
    script = shutil.copy(REPOSITORY / "recipes" / "finetune_dmt.py", tmp_path / "mine.py")
    done = subprocess.run(
        [
            *(sys.executable, script, "--bundle", scene / "b", "--max-steps", "2", "--quiet"),
            *("--data", scene / "rows" / "rows.npz", "--out", tmp_path / "new"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert open_bundle(tmp_path / "new").manifest.initialisation.finetune.steps == 2


def test_usage_errors_end_with_2(capsys) -> None:
    assert call("--bundle", "b") == 2
    assert (
        call(*["--bundle", "b", "--data", "d", "--out", "o", "--epochs", "1", "--max-steps", "2"])
        == 2
    )
    assert "--epochs and --max-steps together" in capsys.readouterr().err
    assert call("--bundle", "b", "--data", "d", "--out", "o", "--epochs", "0") == 2
    assert "--epochs must be an integer >= 1" in capsys.readouterr().err
