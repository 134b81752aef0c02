"""Run the checks one after the other, each in a process of its own with a time limit. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.child import python_command, python_environment
from dmt_convert.config import SelftestConfig
from dmt_convert.selftest.report import CheckResult, Outcome, SelftestReport

_LINES: Final = 12
"""Lines of a process that failed that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing to check."""

    name: str
    """What it is called."""
    function: str
    """`module:function`; the function takes a `Context` and returns an `Outcome`."""
    seconds: float = 300.0
    """How long it may take: many times what it takes on an idle machine."""
    needs: tuple[str, ...] = ()
    """Checks that must have passed, because it goes on with what they leave."""
    quick: bool = True
    """Whether `--quick` runs it."""


_HERE: Final = "dmt_convert.selftest"
CHECKS: Final = (
    Check(name="environment", function=f"{_HERE}.environment:check_environment"),
    Check(name="devices", function=f"{_HERE}.environment:check_devices"),
    Check(name="gloo", function=f"{_HERE}.exchange:check_gloo", needs=("environment",)),
    Check(name="nccl", function=f"{_HERE}.exchange:check_nccl", needs=("environment",)),
    Check(name="kernels", function=f"{_HERE}.kernels:check_kernels", needs=("environment",)),
    Check(name="wire", function=f"{_HERE}.wire:check_wire", needs=("environment",)),
    Check(name="one process", function=f"{_HERE}.training:check_one_process"),
    Check(
        name="training",
        function=f"{_HERE}.training:check_ranks",
        needs=("environment", "one process"),
    ),
    Check(
        name="resume", function=f"{_HERE}.training:check_resume", needs=("training",), quick=False
    ),
    Check(name="syncs", function=f"{_HERE}.steps:check_syncs", needs=("training",)),
    Check(name="step", function=f"{_HERE}.steps:check_step", needs=("training",)),
    Check(
        name="export",
        function=f"{_HERE}.exports:check_exports",
        needs=("one process",),
        seconds=900.0,
        quick=False,
    ),
)
"""All checks, in order. The first says on which device the others run."""


def run_selftest(
    config: SelftestConfig,
    on_result: Callable[[CheckResult], None] = lambda result: None,
    checks: Sequence[Check] | None = None,
) -> SelftestReport:
    """Run the checks.

    Args:
        config: What is asked for.
        on_result: Told of every check when it has run.
        checks: What to run; by default `CHECKS`.
    """
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory(prefix="dmt-selftest-") as folder:
        context: dict[str, Any] = {"folder": folder, "quick": config.quick, "nproc": config.nproc}
        for check in CHECKS if checks is None else checks:
            passed = {r.name for r in results if r.outcome.status == "ok"}
            begin = time.monotonic()
            outcome = _skipped(check, config, passed) or _run(check, context)
            seconds = time.monotonic() - begin
            results.append(CheckResult(name=check.name, outcome=outcome, seconds=seconds))
            context |= outcome.details.get("context", {})
            on_result(results[-1])
    return SelftestReport(results=tuple(results))


def _skipped(check: Check, config: SelftestConfig, passed: set[str]) -> Outcome | None:
    if config.quick and not check.quick:
        return Outcome(status="skipped", line="--quick leaves it out")
    lacking = [name for name in check.needs if name not in passed]
    if lacking:
        return Outcome(status="skipped", line=f"it needs: {', '.join(lacking)}")
    return None


def _run(check: Check, context: dict[str, Any]) -> Outcome:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            python_command("-m", "dmt_convert.selftest.process", check.function),
            env=python_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(json.dumps(context), timeout=check.seconds)
        except subprocess.TimeoutExpired:
            return _failed(f"it did not end within {check.seconds:g} s", log)
        finally:
            _end(process)
        with suppress(IndexError, TypeError, ValueError):
            return Outcome(**json.loads(printed.splitlines()[-1]))
        code = process.returncode
        how = f"killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return _failed(f"its process was {how}" if code < 0 else f"its process {how}", log)


def _failed(line: str, log: Any) -> Outcome:
    log.seek(0)
    lines = [text.rstrip() for text in log if text.strip()][-_LINES:]
    last = f": {lines[-1]:.160}" if lines else ""
    return Outcome(status="differs", line=f"{line}{last}", details={"printed": lines})


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it has started, which is in its session."""
    if process.poll() is None:
        process.terminate()  # a launcher ends its ranks, which are in sessions of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
