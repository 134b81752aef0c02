"""How checks are run: each a process, told apart by how it ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmt_convert.config import SelftestConfig
from dmt_convert.selftest import runner
from dmt_convert.selftest.report import CheckResult, Outcome, SelftestReport
from dmt_convert.selftest.runner import Check, run_selftest

CHECKS = """
import os, signal, subprocess, sys, time
from dmt_convert.errors import ConfigError
from dmt_convert.selftest.report import Outcome

def good(context):
    print("a library says something")
    ranks = f"{context.nproc} ranks on {context.device}, {sorted(os.listdir(context.folder))}"
    (context.folder / "left").touch()
    details = {"context": {"device": "cuda", "ranks": 5}}
    return Outcome(status="ok", line=ranks, details=details)

def wrong(context):
    return Outcome(status="differs", line="1 is not 2")

def lacking(context):
    raise ConfigError("no driver", hint="install one")

def killed(context):
    print("about to die", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def raising(context):
    raise ValueError("a bug")

def hanging(context):
    child = subprocess.Popen(["sleep", "60"])
    (context.folder / "child").write_text(str(child.pid))
    time.sleep(60)

def after_hanging(context):
    child = (context.folder / "child").read_text()
    return Outcome(status="ok", line="alive" if os.path.exists(f"/proc/{child}/exe") else "ended")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SelftestReport]:
    """Run stand-ins for checks, by name."""
    (tmp_path / "stand_ins.py").write_text(CHECKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_checks(*names: str, settings: Any = None, **options: Any) -> SelftestReport:
        checks = [Check(name=name, function=f"stand_ins:{name}", **options) for name in names]
        return run_selftest(SelftestConfig(**(settings or {})), checks=checks)

    return run_checks


def test_a_check_knows_what_those_before_it_found(run: Any) -> None:
    first, second = (result.outcome for result in run("good", "good").results)
    assert (first.line, second.line) == ("2 ranks on cpu, []", "5 ranks on cuda, ['left']")
    asked = run("good", settings={"nproc": 3}).results[0].outcome
    assert asked.line.startswith("3 ranks")


@pytest.mark.parametrize(
    ("name", "status", "line", "code"),
    [
        ("wrong", "differs", "1 is not 2", 4),
        ("lacking", "mend", "no driver. Try: install one", 3),
        ("killed", "differs", "its process was killed (SIGKILL): about to die", 4),
        ("raising", "differs", "its process ended with code 1: ValueError: a bug", 4),
    ],
)
def test_every_way_to_fail_is_told(run: Any, name: str, status: str, line: str, code: int) -> None:
    report = run("good", name)
    outcome = report.results[1].outcome
    assert (outcome.status, outcome.line, report.exit_code) == (status, line, code)
    assert report.verdict == f"does not work: {name}"
    assert " FAILED " in report.results[1].line


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_with_what_it_started(run: Any) -> None:
    hung, after = run("hanging", "after_hanging", seconds=3.0).results
    assert hung.outcome.line.startswith("it did not end within 3 s")
    assert after.outcome.line == "ended"


def test_what_cannot_run_is_skipped_and_said(run: Any) -> None:
    report = run("good", "wrong", needs=("other",))
    assert {result.outcome.line for result in report.results} == {"it needs: other"}
    assert report.exit_code == 0 and report.verdict == "works; not checked: good, wrong"
    quick = run("wrong", quick=False, settings={"quick": True})
    assert quick.results[0].line.split() == ["wrong", "skipped", "(--quick", "leaves", "it", "out)"]


def test_the_report_is_a_file_and_the_command_tells_it(
    call_dmt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stand_in(check: Check, context: dict[str, Any]) -> Outcome:
        return Outcome(status="differs" if check.name == "wire" else "ok", line="seen")

    monkeypatch.setattr(runner, "_run", stand_in)
    done = call_dmt("selftest", "--quick", "--out", tmp_path / "report")
    assert done.code == 4, done
    assert "wire         FAILED   seen" in done.stdout
    assert "verdict: does not work: wire; not checked: resume, export." in done.stdout
    written = json.loads((tmp_path / "report/selftest.json").read_text())
    assert [check["status"] for check in written["checks"]].count("ok") == 9
    printed = json.loads(call_dmt("selftest", "--out", tmp_path / "r", "--json").stdout)
    assert printed["exit_code"] == 4 and len(printed["checks"]) == 12


def test_needs_name_checks_that_come_before() -> None:
    names = [check.name for check in runner.CHECKS]
    for i, check in enumerate(runner.CHECKS):
        assert set(check.needs) <= set(names[:i])


def test_lines_line_up() -> None:
    outcome = Outcome(status="ok", line="fine")
    line = CheckResult(name="one process", outcome=outcome, seconds=1.4).line
    assert line == "one process  ok       fine  1 s"
