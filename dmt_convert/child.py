"""Python processes that this program starts: none imports a file of the current folder.

`python -m module` puts the current folder before the standard library, so that a `torch.py` or
`json.py` lying there would run. `-P` leaves it out, and `PYTHONSAFEPATH` does the same for whatever
Python processes a child starts in turn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

_SAFE: Final = "-P"


def python_command(*arguments: str) -> list[str]:
    """Return the command line of a Python process: `python_command("-m", "package.module")`.

    Start it with `python_environment`.
    """
    return [sys.executable, _SAFE, *arguments]


def python_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a Python process, also for those that it starts.

    Args:
        changes: Variables that differ from this process's own.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **(changes or {})}
