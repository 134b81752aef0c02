"""Runs one topology's stage in sealed namespaces and hands on what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DmtError

from .namespaces import Mode, seal
from .settings import Settings

_ROOT: Final = Path(__file__).parents[2]
"""Of the repository."""


def run_topology(settings: Settings, mode: Mode, logs: Path) -> Generator[dict[str, Any]]:
    """Launch a cluster and yield the stage's events; nothing of it is left when this ends.

    Args:
        settings: With one topology.
        mode: From `find_mode`.
        logs: Folder for the logs of the ranks; it is made.

    Raises:
        DmtError: What the stage refused, or that it died.
    """
    logs.mkdir(parents=True, exist_ok=True)
    module = f"{__package__}.stage"
    command = [sys.executable, "-m", module, json.dumps(settings.to_json()), str(logs.resolve())]
    # In a session of its own, so that Ctrl-C reaches this process only. The stage lives as long as
    # its stdin, so it ends with this process; its end ends all that it started.
    process = subprocess.Popen(
        seal(mode, command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=_ROOT,  # `-m` finds this package there
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                raise DmtError.from_json(event)
            yield event
    finally:
        process.stdin.close()
        code = process.wait()
        process.stdout.close()
    if code != 0:
        raise DmtError(
            f"the cluster {settings.topology.name} ended with code {code}",
            expected="it to run to the end",
            hint="its last words are above; was it killed, or did the machine run out of memory?",
        )
