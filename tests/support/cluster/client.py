"""Ask the servers of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from support.paths import REPOSITORY, TESTS

RunRanks = Callable[..., list[dict[str, Any]]]


def environment() -> dict[str, str]:
    """The environment of processes that import `support` and the library."""
    paths = [str(REPOSITORY), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def serve(module: str, *arguments: str) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Keep a server of `support.cluster`; yields what sends a job and returns the answer."""
    server = subprocess.Popen(
        [sys.executable, "-m", f"support.cluster.{module}", *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def ask(job: Mapping[str, Any]) -> Any:
        asked.write(json.dumps(job, default=str) + "\n")
        asked.flush()
        return json.loads(answers.readline())

    with server:
        try:
            yield ask
        finally:
            asked.close()


@contextmanager
def serve_ranks(scenarios: str) -> Iterator[RunRanks]:
    """Keep a process that has torch, and forks ranks for the scenarios of a module beside this one.

    Yields:
        `run(size, name, *, ends=True, job={}, **arguments)`: what `rank_server` says of every
        rank. If the scenario `ends`, all ranks have to end well.
    """
    with serve("rank_server", f"support.cluster.{scenarios}") as ask:

        def run(
            size: int,
            name: str,
            *,
            ends: bool = True,
            job: Mapping[str, Any] | None = None,
            **arguments: Any,
        ) -> list[dict[str, Any]]:
            asked = {"size": size, "name": name, "arguments": arguments, **(job or {})}
            reports: list[dict[str, Any]] = ask(asked)
            if ends:
                for report in reports:
                    assert report["code"] == 0, report["errors"]
            return reports

        yield run


@contextmanager
def serve_recipe() -> Iterator[Callable[..., dict[str, Any]]]:
    """Keep a process that runs the fine-tuning recipe; yields `run(hosts=2, ranks=1, ...)`.

    See `cluster_server` for the fields of a job and of the answer.
    """
    with serve("cluster_server") as ask:

        def run(**job: Any) -> dict[str, Any]:
            found: dict[str, Any] = ask(job)
            return found

        yield run
