"""Run `dmt`."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a run of `dmt` ended."""

    code: int
    stdout: str
    stderr: str


def run_dmt(*args: object, **options: Any) -> Run:
    """Run `dmt` in a process of its own; options are those of `subprocess.run`."""
    command = [sys.executable, "-m", "dmt_convert.cli.main", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    return Run(code=done.returncode, stdout=done.stdout, stderr=done.stderr)
