"""Run scenarios over gloo ranks: torch is imported once, then a process is forked per rank.

Run as `python rank_server.py SCENARIOS`, a file that defines `SCENARIOS`: name -> function. Reads
one JSON object per line: the scenario's "name" and "arguments", "size" (ranks), and perhaps
"ranks_per_host", "environ", "seconds" (after which what still runs is killed), and "meets": false
where the scenario is to make the process group itself. Answers with one line: per rank its exit
code, what the scenario returned, and the end of its stderr. `tests/conftest.py` has the client.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what DTensor imports when it is first made, in every rank
import torch.distributed as dist

SECONDS = 60.0
"""After which what still runs is killed, where the job does not say."""


def run_rank(scenarios: dict[str, Any], rank: int, job: dict[str, Any], folder: Path) -> None:
    """Be one rank; never returns."""
    code, size = 1, job["size"]
    try:
        descriptor = os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, 2)
        os.dup2(2, 1)
        per_host = job.get("ranks_per_host", size)
        numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % per_host}
        numbers["LOCAL_WORLD_SIZE"] = per_host
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(job.get("environ", {}))
        if job.get("meets", True):
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
            )
        found = scenarios[job["name"]](**job["arguments"])
        (folder / f"result-{rank}").write_text(json.dumps(found))
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_job(scenarios: dict[str, Any], job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run all ranks of one scenario."""
    children = {}
    for rank in range(job["size"]):
        child = os.fork()
        if child == 0:
            run_rank(scenarios, rank, job, folder)
        children[child] = rank
    codes: dict[int, int] = {}
    seconds = job.get("seconds", SECONDS)
    end = time.monotonic() + seconds
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            for left in children:
                os.kill(left, signal.SIGKILL)
            end += seconds
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
    path = Path(sys.argv[1])
    sys.path.insert(0, str(path.parent))
    scenarios = importlib.import_module(path.stem).SCENARIOS
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_job(scenarios, json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
