"""A short run of benchmarks/faults.py: nothing is lost when a command is interrupted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from support.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import faults
    return faults


def test_moments_are_spread_over_the_whole_run(faults):
    import random

    found = faults.moments(100, 10, random.Random(0))
    assert [(moment - 1) // 10 for moment in found] == list(range(10))
    assert len(faults.moments(3, 10, random.Random(0))) == 10


def test_a_broken_target_and_a_lost_one_are_counted(faults, tmp_path):
    class Broken(faults.Job):
        name = "broken"
        after = ("target",)

        def make_inputs(self) -> None:
            (self.inputs / "x").write_text("x")

        def work(self, *, older: bool = False) -> Callable[[], object]:
            return self.run_again

        def source(self) -> list[Path]:
            return []

        def run_again(self) -> object:
            return faults.Ended(code=3, said="still broken")

    job = Broken(tmp_path / "job")
    job.old, job.new = {"": b"old"}, {"": b"new"}
    strike = faults.Strike(fault="EIO", nth=7, folder=tmp_path, file=tmp_path)
    outcomes = faults.Outcomes()
    job.out.write_bytes(b"half of the new")
    faults.note(job, outcomes, strike, faults.Ended(code=3, said="no parts"), with_old=True)
    job.out.unlink()
    faults.note(job, outcomes, strike, faults.Ended(code=0, said=""), with_old=True)
    said = "\n".join(outcomes.lost)
    assert "neither old nor new" in said and "the old target is gone" in said
    assert "a refusal of one part" in said and "code 0, but the target is absent" in said
    assert "run again: code 3" in said and outcomes.again == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_few_moments_of_unshard(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--moments", "2", "--commands", "unshard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| unshard")]
    assert done.returncode == 0 and len(rows) == 5, done.stdout + done.stderr[-2000:]
    assert all(line.endswith("| 2 | 0 |") for line in rows)
