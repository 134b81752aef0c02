"""A short run of benchmarks/almost_right.py: no command may answer wrongly in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dmt_convert.checkpoint.readers import torch_reader
from support.paths import REPOSITORY
from support.shortcuts import sample_few, skip_export_checks, skip_report

SCRIPT = REPOSITORY / "benchmarks" / "almost_right.py"
QUICK = (
    "dense tensor missing",
    "a rank's file of another save",
    "one of the hub's shards",
    "a bit flipped where a checksum is",
    "a snapshot's manifest with a gap",
    "trainer's description does not fit",
    "a weights file missing, cut or padded",
    "a partition file of another model",
    "columns in another order",
    "ids that are no rows",
)
"""Kinds of all rooms that need no shared preparation."""


@pytest.fixture(scope="module")
def almost_right() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import almost_right
    return almost_right


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    sample_few(monkeypatch, 256)
    skip_report(monkeypatch)
    skip_export_checks(monkeypatch)


def verdicts(almost_right: ModuleType, folder: Path, kind: str, number: int = 0) -> list[str]:
    task = almost_right.Task(kind=kind, number=number)
    folder.mkdir(exist_ok=True)
    outcomes = almost_right.attempt(task, 0, folder, folder)
    return [f"{outcome.verdict}: {outcome.command}: {outcome.said}" for outcome in outcomes]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", QUICK)
def test_a_faulty_input_is_read_rightly_or_refused(almost_right, tmp_path, kind):
    said = verdicts(almost_right, tmp_path, kind)
    assert said and not [line for line in said if line.startswith(("SILENT", "CRASH"))]


@pytest.mark.usefixtures("quick")
def test_a_check_that_is_lost_is_found(almost_right, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_reader, "_compare_dense", lambda *_: None)
    said = verdicts(almost_right, tmp_path, "a rank's file of another save")
    assert any(line.startswith("SILENT: score: off by") for line in said)


def test_a_table_shows_what_went_wrong(almost_right, capsys):
    task = almost_right.Task(kind="dense tensor missing", number=3)
    outcome = almost_right.Outcome(command="score", verdict="SILENT", said="off by 7")
    options = almost_right.parse(["--seed", "5"])
    assert almost_right.report([(task, [outcome])], options, 1.0) == 1
    printed = capsys.readouterr().out
    assert "| tensors: dense tensor missing | 1 |  |  |  | 1 |  |" in printed
    assert "--only 'dense tensor missing' --number 3 --seed 5 --keep DIR" in printed


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [12, pytest.param(120, marks=pytest.mark.exhaustive)])
def test_inputs_of_all_areas(inputs):
    command = [sys.executable, str(SCRIPT), "--inputs", str(inputs), "--seed", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    outcomes = json.loads(done.stdout)["outcomes"]
    wrong = [outcome for outcome in outcomes if outcome["verdict"] in ("SILENT", "CRASH")]
    assert len(outcomes) > inputs and not wrong and done.returncode == 0
