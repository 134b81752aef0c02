"""Run scenarios over gloo ranks: torch is imported once, then a process is forked per rank.

Reads one JSON object per line ({"name", "size", "arguments"}), answers with one: per rank its exit
code, what the scenario returned, and the end of its stderr. Run as `python rank_server.py MODULE`,
whose SCENARIOS it runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Scenarios = Mapping[str, Callable[..., Any]]
SECONDS = 60.0
"""After which what still runs is killed."""


def run_rank(rank: int, job: dict[str, Any], folder: Path, scenarios: Scenarios) -> None:
    """Be one rank; never returns."""
    code = 1
    try:
        descriptor = os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, 2)
        os.dup2(2, 1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=job["size"]
        )
        found = scenarios[job["name"]](**job["arguments"])
        (folder / f"result-{rank}").write_text(json.dumps(found))
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_job(job: dict[str, Any], folder: Path, scenarios: Scenarios) -> list[dict[str, Any]]:
    """Run all ranks of one scenario."""
    children = {}
    for rank in range(job["size"]):
        child = os.fork()
        if child == 0:
            run_rank(rank, job, folder, scenarios)
        children[child] = rank
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            for left in children:
                os.kill(left, signal.SIGKILL)
            end += SECONDS
        else:
            time.sleep(0.01)
    reports = []
    for rank in sorted(codes):
        result = folder / f"result-{rank}"
        reports.append(
            {
                "code": codes[rank],
                "result": json.loads(result.read_text()) if result.exists() else None,
                "errors": (folder / f"errors-{rank}").read_text()[-4000:],
            }
        )
    return reports


def main() -> None:
    torch.set_num_threads(1)
    scenarios: Scenarios = import_module(sys.argv[1]).SCENARIOS
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_job(json.loads(line), Path(folder), scenarios)), flush=True)


if __name__ == "__main__":
    main()
