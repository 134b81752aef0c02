"""Metrics as training goes: on the disk at once, and the same after a resume."""

from __future__ import annotations

import json
import logging
import math
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dmt_convert.errors import DmtError
from dmt_convert.training import training_log
from dmt_convert.training.training_log import METRICS, TENSORBOARD, TrainingLog, read_log

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def write(folder: Path, steps: range, *, resumed: int | None = None, scale: float = 1) -> None:
    with TrainingLog(folder, resumed_step=resumed) as log:
        for step in steps:
            log.write(step, {"loss": scale / step, "rows_per_s": 100.0 * step})


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_log(folder)]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "log"
    log = TrainingLog(folder, tensorboard=False)
    log.write(1, {"loss": 0.5, "auc": None, "ne": math.nan, "lr/tables": math.inf})
    (line,) = (folder / METRICS).read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time") > 1.7e9
    assert record == {"step": 1, "loss": 0.5, "auc": None, "ne": None, "lr/tables": None}
    log.write(2, {"loss": 0.25})
    assert losses(folder) == [(1, 0.5), (2, 0.25)]
    log.close()
    log.close()
    log.write(3, {"loss": 0})  # after the end nothing is written
    assert len(read_log(folder)) == 2


def test_the_log_of_a_resumed_training_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "parts", range(1, 7), scale=1)
    write(tmp_path / "parts", range(5, 9), resumed=4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    write(tmp_path / "parts", range(1, 3), resumed=0)  # killed before its first checkpoint
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[:2]


def test_a_new_training_begins_a_new_log(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    write(tmp_path, range(1, 3))
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


@pytest.mark.parametrize("rest", [b'{"step": 4, "lo', b"\0\0\0\0\n", b"[1]\n", b"{}\n"])
def test_a_line_that_was_cut_is_dropped(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path, range(1, 4))
    with (tmp_path / METRICS).open("ab") as file:
        file.write(rest)
    assert len(read_log(tmp_path)) == 3
    write(tmp_path, range(4, 6), resumed=9)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_a_killed_training_logged_is_there(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from dmt_convert.training.training_log import TrainingLog\n"
        "log = TrainingLog(Path(sys.argv[1]), tensorboard=False)\n"
        "for step in range(1, 101):\n    log.write(step, {'loss': 1 / step})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert len(read_log(tmp_path)) == 100


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with TrainingLog(None, resumed_step=3) as log:
        log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DmtError, match=r"cannot be written or read \(Not a directory\)"):
        TrainingLog(tmp_path / "file" / "log")
    with pytest.raises(DmtError, match="No such file"):
        read_log(tmp_path)
    log = TrainingLog(tmp_path, tensorboard=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(DmtError, match="File too large"):
            log.write(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()


def test_without_tensorboard_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_log, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="dmt_convert"):
        write(tmp_path, range(1, 3))
    assert "pip install tensorboard" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


@needs_tensorboard
def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "valid/auc": None})
        log.write(2, {"loss": 0.25, "valid/auc": 0.75})
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path, "valid/auc") == [(2, 0.75)]


@needs_tensorboard
def test_tensorboard_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 7), scale=2)
    write(tmp_path, range(5, 9), resumed=4, scale=4)
    expected = [(s, 2 / s) for s in range(1, 5)] + [(s, 4 / s) for s in range(5, 9)]
    assert scalars(tmp_path, "loss") == [(s, pytest.approx(v)) for s, v in expected]
    write(tmp_path, range(1, 3))
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2]
