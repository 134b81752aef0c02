"""The process of one check: `python -m dmt_convert.selftest.process MODULE:FUNCTION`.

It reads what its `Context` is made of from stdin, and writes an `Outcome` as the last line of
stdout, both as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from dmt_convert.errors import DmtError
from dmt_convert.selftest.report import Outcome, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a check knows."""

    folder: Path
    """Where checks leave what later ones go on with."""
    quick: bool
    """Whether to be quick."""
    nproc: int
    """Ranks to start."""
    device: str = "cpu"
    """cpu or cuda."""


def main(function: str) -> int:
    """Run one check."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    given = json.loads(sys.stdin.read())
    context = Context(
        folder=Path(given["folder"]),
        quick=given["quick"],
        nproc=given["nproc"] or given.get("ranks", 2),
        device=given.get("device", "cpu"),
    )
    module, _, name = function.partition(":")
    check: Callable[[Context], Outcome] = getattr(import_module(module), name)
    try:
        outcome = check(context)
    except DmtError as error:
        line = error.found if not error.hint else f"{error.found}. Try: {error.hint}"
        status: Status = "mend" if error.exit_code in (2, 3) else "differs"
        outcome = Outcome(status=status, line=line, details=error.to_json())
    answer.write(json.dumps(asdict(outcome)) + "\n")
    answer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
