"""benchmarks/frontier.py converts what was not measured yet; its tables show what was found."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from support.paths import REPOSITORY


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    yield importlib.import_module("frontier"), importlib.import_module("frontier_tables")
    for name in ("frontier", "frontier_tables", "flat_models", "quality_tables"):
        del sys.modules[name]


def write_rows(folder: Path) -> None:
    random = np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "valid", "test"):
        ids = random.integers(9, size=(256, 4))
        labels = (ids.sum(1) > 16).astype(np.uint8)
        np.savez(folder / f"{split}.npz", sparse=ids, label=labels, dense=np.zeros((256, 0)))


@pytest.mark.slow
def test_run_is_taken_up_again(
    modules: tuple[ModuleType, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench, tables = modules
    write_rows(tmp_path / "rows")
    command = ["frontier.py", "--data", str(tmp_path / "rows"), "--towers", "2", "9"]
    command += ["--flat-cache", str(tmp_path / "flat"), "--results", str(tmp_path / "found")]
    command += ["--set", "distill_steps=0", "--compressions", "2"]
    monkeypatch.setattr("sys.argv", command)
    bench.main()
    path = tmp_path / "found" / "frontier.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["variant"] for r in records] == [
        *("flat fp32", "flat bf16", "flat int8"),
        *("default", "default"),
    ]
    assert records[0]["auc_lost"] == 0
    assert records[3]["bytes"] == 2 * 4 * 16  # half of 4 features of 16 float32
    assert "9 towers" in records[4]["refused"]
    assert all(bench.read_commit() == r["commit"] for r in records)
    bench.main()
    assert len(path.read_text().splitlines()) == len(records)
    capsys.readouterr()
    tables.print_tables(tables.read_results(tmp_path / "found", None))
    assert "| frontier: default | calibrated | 2 |" in capsys.readouterr().out


def test_commit_says_that_files_were_changed(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    file.write_text("1")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *command], check=True)
    clean = modules[0].read_commit(tmp_path)
    assert len(clean) >= 7
    file.write_text("2")
    assert modules[0].read_commit(tmp_path) == clean + "+dirty"


def test_int8_is_within_half_a_level(modules: tuple[ModuleType, ModuleType]) -> None:
    vectors = torch.randn(64, 16) * torch.logspace(-4, 4, 64)[:, None]
    error = (modules[0].round_int8(vectors) - vectors).abs().amax(1)
    level = vectors.abs().amax(1) / 127
    assert bool((error <= level * 0.5001).all())  # 0.01 %: float32
    assert bool((error > level * 0.1).any())


def record(**changes: Any) -> dict[str, Any]:
    return {"auc_lost": 0.0012, "r2": 0.98, "achieved": 8.0, "compression": 8.0} | changes


def test_cells_say_what_was_asked_for_and_found(modules: tuple[ModuleType, ModuleType]) -> None:
    show = modules[1].show_cell
    assert show([]) == ""
    assert show([record()]) == "0.0012, 0.9800"
    assert show([record(achieved=9.45)]) == "0.0012, 0.9800 at / 9.45"
    assert show([record(), record(auc_lost=0.0022)]) == "0.0017 (0.0010), 0.9800"
    assert show([record(tuned_auc_lost=-0.0001)]) == "0.0012, 0.9800 -> -0.0001"


def test_a_summary_shows_the_worst_seed(
    modules: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"data": "rows", "arch": "dlrm", "dim": 16, "towers": 4, "sample": "calibrated"}
    line |= {"variant": "default"}
    seeds = [record(**line, seed=0), record(**line, seed=1, auc_lost=0.0022, r2=0.97)]
    modules[1].print_summary([*seeds, record(**line | {"variant": "linear"}, seed=0, auc_lost=9)])
    printed = capsys.readouterr().out
    assert "| rows | dlrm, 16 | 4 | calibrated | 0.0017 (at most 0.0022 of 2), 0.9700 |" in printed
    assert modules[1].show_worst([record(auc_lost=-1e-9)]) == "0.0000, 0.9800"


def test_picture_is_drawn(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    model = {"data": "rows", "arch": "dlrm", "dim": 16, "seed": 0, "auc": 0.8, "label": "now"}
    line = {"towers": 4, "sample": "calibrated", "variant": "default"}
    found = [record(compression=c, achieved=c) | model | line for c in (2.0, 4.0)]
    found.append(record(variant="flat fp32", auc_lost=0.0, achieved=1) | model)
    modules[1].draw(found, tmp_path / "f.svg")
    assert "rows, dlrm, N = 16" in (tmp_path / "f.svg").read_text()
