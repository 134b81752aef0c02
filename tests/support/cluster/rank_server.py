"""Run scenarios over gloo ranks: torch is imported once, then a process is forked per rank.

Run as `python -m support.cluster.rank_server MODULE`, which defines `SCENARIOS`: name -> function.
A job has the scenario's "name" and "arguments", "size" (ranks), and perhaps "ranks_per_host",
"environ", "seconds" (after which what still runs is killed), and "meets": false if the scenario is
to make the process group itself. The answer: per rank its exit code, what the scenario returned,
and the end of its stderr. `client.serve_ranks` asks.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what DTensor imports when it is first made, in every rank
import torch.distributed as dist

from support.cluster.forks import answer_lines, await_ranks, write_output

SECONDS = 60.0
"""After which what still runs is killed, unless the job says otherwise."""


def run_rank(scenarios: dict[str, Any], rank: int, job: dict[str, Any], folder: Path) -> None:
    """Be one rank; never returns."""
    code, size = 1, job["size"]
    try:
        write_output(folder / f"errors-{rank}", folder / f"errors-{rank}")
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
    codes = await_ranks(children, job.get("seconds", SECONDS))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_lines(partial(run_job, importlib.import_module(sys.argv[1]).SCENARIOS))
