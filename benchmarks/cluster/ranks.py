"""The ranks of one launch, asked and answering all together."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DmtError

_QUIET: Final = ("-W", "ignore::FutureWarning")
"""TorchRec and torch warn of each other at every launch."""
_LOG_LINES: Final = 15
_SETTLE_S: Final = 2.0
"""How long the others get to fail too when one has: the first one to die is often not the one
whose answer is missed first."""


class Ranks:
    """Processes of the module `worker`, each with pipes for requests and answers.

    Args:
        timeout_s: Longest that all answers to one request may take.
        logs: Folder for what the ranks print.
    """

    def __init__(self, timeout_s: float, logs: Path) -> None:
        self.timeout_s = timeout_s
        self.logs = logs
        self.processes: list[subprocess.Popen[str]] = []

    def launch(self, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start the next rank, in the network namespace that this process is in."""
        with self._log(len(self.processes)).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *_QUIET, "-m", f"{__package__}.worker", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment,
                text=True,
            )
        self.processes.append(process)

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Send a request to all ranks and wait for all answers.

        Raises:
            DmtError: A rank ended or was silent for too long; it says which, and what it printed.
        """
        line = json.dumps(request) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                raise self._ended(request) from None
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise self._silent(request, answers.keys())
                for key, _ in ready:
                    stream = self.processes[key.data].stdout
                    assert stream is not None
                    text = stream.readline()
                    if not text:
                        raise self._ended(request)
                    answers[key.data] = json.loads(text)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.processes))]

    def _ended(self, request: Mapping[str, Any]) -> DmtError:
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        # A killed rank is the cause, the others' broken connections are the consequence.
        killed = [rank for rank, code in ended.items() if code < 0]
        suspects = killed or list(ended)
        details = [f"rank {rank} {_how(ended[rank])}" for rank in sorted(ended)]
        return DmtError(
            f"{_ranks(suspects)} ended while asked to {request['do']} {request['variant']}",
            expected="every rank to run to the end",
            hint=f"read the ranks' logs in {self.logs}; where one was killed, see whether the "
            "machine ran out of memory",
            details=[*details, *self._tail(suspects[:1])],
        )

    def _silent(self, request: Mapping[str, Any], answered: object) -> DmtError:
        assert hasattr(answered, "__contains__")
        silent = [rank for rank in range(len(self.processes)) if rank not in answered]
        return DmtError(
            f"{_ranks(silent)} gave no answer to {request['do']} {request['variant']} within "
            f"{self.timeout_s:g} s",
            expected="an answer from every rank",
            hint="raise --timeout, or lower --steps, --batch or the number of ranks",
            details=self._tail(silent[:1]),
        )

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:02}.log"

    def _tail(self, ranks: list[int]) -> list[str]:
        lines = []
        for rank in ranks:
            text = self._log(rank).read_text("utf-8", errors="replace").splitlines()
            lines += [f"rank {rank}: {line}" for line in text[-_LOG_LINES:]]
        return lines


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
