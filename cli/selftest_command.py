"""`dmt selftest`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import dmt_convert as dmt
from dmt_convert.config import SelftestConfig

from .console import Output, visible
from .options import command

if TYPE_CHECKING:
    from dmt_convert.selftest import CheckResult

NAME = "selftest"


@command(SelftestConfig)
def run(*, config: SelftestConfig, output: Output) -> None:
    """Check that training, checkpoints and exports work on this machine. Needs no data.

    Starts ranks on the GPUs, or on the CPU if there are none. Takes up to ten minutes. Exits with
    4 if a check differs, and with 3 if something on the machine has to be mended.

    Example: `dmt selftest --quick`
    """

    def show(result: CheckResult) -> None:
        if not output.json:
            print(visible(result.line), flush=True)

    report = dmt.check_machine(config=config, on_result=show)
    path = report.write(config.out or Path())
    if output.json:
        output.result({**report.to_json(), "path": str(path)})
    else:
        print(visible(f"verdict: {report.verdict}. Attach {path} to a report."))
        sys.stdout.flush()
    if report.exit_code:
        raise typer.Exit(report.exit_code)
