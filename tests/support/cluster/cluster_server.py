"""Run the fine-tuning recipe over ranks as torchrun would, in forked processes.

torch and torchrec are imported once. Run as `python -m support.cluster.cluster_server`; a job:
hosts, ranks (per host), arguments (of the recipe), restarts (how often the ranks are started again
after one failed), faults ([{"rank", "attempt", "moment", ...}], see MOMENTS), environment. The
answer: per attempt, per rank the exit code, what it printed, and seconds until all were gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torchrec  # noqa: F401
from torch.distributed import TCPStore

from dmt_convert.cluster import rank_process, trainer
from dmt_convert.recipes import finetune_dmt
from dmt_convert.training import finetuned
from support.cluster import checkpoint_scenarios
from support.cluster.forks import answer_lines, await_ranks, write_output

SECONDS = 60.0
"""After which what still runs is killed."""


def strike(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


ACTS: dict[str, Callable[[], None]] = {
    "kill": strike(signal.SIGKILL),
    "stop": strike(signal.SIGSTOP),
    "full disk": limit_files,
    "slow": lambda: time.sleep(5),
    "terminate": strike(signal.SIGTERM),
    "user signal": strike(signal.SIGUSR1),
}
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    **checkpoint_scenarios.MOMENTS,
    "step": (finetune_dmt, "take_step", False),
    "measure": (trainer.ClusterTrainer, "measure", False),
    "sums": (trainer.ClusterTrainer, "start_sums", False),
    "write": (finetuned, "write_trained", False),
    "half written": (finetuned, "render_documents", False),
    "written": (finetuned, "write_trained", True),
}
"""Where a fault strikes: before a function is called, or after."""


def arrange(fault: dict[str, Any]) -> None:
    """Let a fault strike at the `time`-th call of a function."""
    owner, name, after = MOMENTS[fault["moment"]]
    original, left = getattr(owner, name), [fault.get("time", 1)]

    def struck(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0] and not after:
            ACTS[fault.get("act", "kill")]()
        found = original(*arguments, **options)
        if not left[0] and after:
            ACTS[fault.get("act", "kill")]()
        return found

    setattr(owner, name, struck)


def run_rank(rank: int, attempt: int, job: dict[str, Any], folder: Path, port: int) -> None:
    """Be one rank; never returns."""
    code = 1
    try:
        write_output(folder / "stdout", folder / "stderr")
        for fault in job.get("faults", ()):
            if fault["rank"] == rank and fault.get("attempt", 0) == attempt:
                arrange(fault)
        receive, size = port, job["hosts"] * job["ranks"]
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank % job["ranks"]),
            LOCAL_WORLD_SIZE=str(job["ranks"]),
            MASTER_ADDR="localhost",
            MASTER_PORT=os.read(receive, 16).decode(),
            TORCHELASTIC_RUN_ID="tests",
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=str(attempt),
            TORCHELASTIC_ERROR_FILE=str(folder / "error.json"),
            **job.get("environment", {}),
        )
        finetune_dmt.main(job["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_attempt(job: dict[str, Any], attempt: int, folder: Path) -> list[dict[str, Any]]:
    """Start all ranks; when one has failed, end the others."""
    size = job["hosts"] * job["ranks"]
    pipes = [os.pipe() for _ in range(size)]
    children = {}
    for rank, (receive, _) in enumerate(pipes):
        own = folder / f"attempt_{attempt}_{rank // job['ranks']}" / str(rank)
        own.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            run_rank(rank, attempt, job, own, receive)
        children[child] = rank
    for receive, send in pipes:
        os.close(receive)
        os.write(send, str(job["port"]).encode())
        os.close(send)
    codes = await_ranks(children, SECONDS, end_others=True)
    return [
        {
            "code": codes[rank],
            "stdout": (folder / f"attempt_{attempt}_{rank // job['ranks']}" / f"{rank}/stdout"),
            "stderr": (folder / f"attempt_{attempt}_{rank // job['ranks']}" / f"{rank}/stderr"),
        }
        for rank in range(size)
    ]


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run all attempts, until one ends well."""
    begin = time.monotonic()
    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=30))
    job["port"] = store.port
    attempts = []
    for attempt in range(job.get("restarts", 0) + 1):
        reports = run_attempt(job, attempt, folder)
        attempts.append(reports)
        if not any(report["code"] for report in reports):
            break
    for reports in attempts:
        for report in reports:
            for name in ("stdout", "stderr"):
                report[name] = report[name].read_text() if report[name].exists() else ""
    return {"attempts": attempts, "seconds": time.monotonic() - begin}


def warm_up() -> None:
    """Import what ranks would import one by one, when they first need it."""
    torch.nn.EmbeddingBag(2, 2, device="meta")
    for name in ("torch.utils.tensorboard", "torch.distributed.checkpoint"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    rank_process._ABORT_SECONDS = 1.0  # type: ignore[misc]
    rank_process._GRACE_SECONDS = 1.0  # type: ignore[misc]
    answer_lines(run_job)
