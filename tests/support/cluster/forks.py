"""Ranks that are forked from a process that has torch, and a server that is asked line by line."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_output(stdout: Path, stderr: Path) -> None:
    """Send what this process prints to files."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)


def await_ranks(
    children: dict[int, int], seconds: float, *, end_others: bool = False
) -> dict[int, int]:
    """Wait for processes; return the exit code of each rank.

    Args:
        children: the rank of each process.
        seconds: after which what still runs is killed.
        end_others: when one has failed, end the others as torchrun does.
    """
    codes: dict[int, int] = {}
    end, told = time.monotonic() + seconds, False
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            for left in children:
                os.kill(left, signal.SIGKILL)
            end += seconds
        elif end_others and any(codes.values()) and not told:
            time.sleep(0.1)
            for left in children:
                os.kill(left, signal.SIGTERM)
            end, told = min(end, time.monotonic() + 1), True
        else:
            time.sleep(0.005)
    return codes


def answer_lines(run_job: Callable[[dict[str, Any], Path], Any]) -> None:
    """Read a job per line, run it in a folder of its own, answer with a line.

    A job runs in a forked process: what forks the ranks has no threads but those it made itself.
    """
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            receive, send = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(receive)
                with os.fdopen(send, "w") as answer:
                    answer.write(json.dumps(run_job(json.loads(line), Path(folder))))
                os._exit(0)
            os.close(send)
            with os.fdopen(receive) as answer:
                print(answer.read(), flush=True)
            os.waitpid(child, 0)
