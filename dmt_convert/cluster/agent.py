"""torchrun, ending with one clear error instead of its own traceback.

    python -m dmt_convert.cluster.agent TORCHRUN_ARGUMENTS RECIPE RECIPE_ARGUMENTS

takes what `python -m torch.distributed.run` takes. Ranks that refuse (exit codes 2 and 3) are not
started again. Of all ranks that failed, the one behind it gives the exit code and the error, which
is left in the agent's own error file for the launcher.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from dmt_convert.cluster.gpus import has_gpus
from dmt_convert.cluster.rank_process import (
    INTERRUPT_CODE,
    die_with_parent,
    read_error,
    write_error,
)
from dmt_convert.cluster.ranks import host_store, is_loopback
from dmt_convert.errors import ConfigError, DmtError

_LOOPBACK: Final = "127.0.0.1"
_FINAL_CODES: Final = frozenset({2, 3, INTERRUPT_CODE})
"""Exit codes after which a new start cannot help: usage, what the user has to mend, a stop."""


class _Agent(LocalElasticAgent):
    """Starts ranks again only if that can help, and says so."""

    error_files: ClassVar[dict[int, str]] = {}
    """Local rank -> where it leaves its error, of the ranks started last."""
    ended: ClassVar[set[int]] = set()
    """Local ranks that ran until this process ended them, because another one had failed."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        context: Any = self._pcontext
        _Agent.error_files = dict(context.error_files)
        _Agent.ended = set()
        close = context.close

        def close_noting(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            """End ranks; SIGHUP tells them that none will hear them: they stop at once."""
            if death_sig is None and not _Agent.ended:
                handlers = context.subprocess_handlers
                _Agent.ended = {rank for rank, h in handlers.items() if h.proc.poll() is None}
            close(death_sig or signal.SIGHUP, timeout)

        context.close = close_noting
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            if any(failure.exitcode in _FINAL_CODES for failure in result.failures.values()):
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                note = (
                    f"note: {_describe(*_cause(result.failures))}; starting the ranks of this "
                    f"host again ({self._remaining_restarts} more times at most)\n"
                )
                sys.stderr.write(note)
                sys.stderr.flush()
        return result


def main(arguments: list[str]) -> int:
    """Run the ranks; returns the exit code."""
    die_with_parent(signal.SIGTERM)
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # under nohup ranks would inherit that it is ignored
    if os.environ.get("DMT_TRACEBACK") != "1":
        logging.disable(logging.CRITICAL)  # torchrun's own account of the same failure
    setattr(import_module("torch.distributed.launcher.api"), "LocalElasticAgent", _Agent)  # noqa: B010
    run = import_module("torch.distributed.run")  # neither module has types
    options = run.parse_args(arguments)
    if not torch.cuda.is_available():
        options.numa_binding = None  # it asks for GPUs; ranks say why there are none
    if options.nnodes == "1" and is_loopback(options.local_addr or ""):
        _listen_on_loopback()
    try:
        run.run(options)
    except ChildFailedError as error:
        return _conclude(error.failures)
    except (RendezvousError, DistError) as error:
        return _hand_on(_rendezvous_error(options, error))
    except SignalException as stop:
        _hand_on_stop()
        return 128 + int(stop.sigval)
    return 0


def _listen_on_loopback() -> None:
    """Let the store at which agents meet hear this host only; torch's own hears all."""

    def make_store(host: str, port: int, *, is_master: bool, **options: Any) -> TCPStore:
        if is_master:
            return host_store(_LOOPBACK, port, options["timeout"])
        return TCPStore(host, port, is_master=False, **options)

    module = import_module("torch.distributed.elastic.rendezvous.c10d_rendezvous_backend")
    setattr(module, "TCPStore", make_store)  # noqa: B010


def _hand_on_stop() -> None:
    """Hand on what ranks say that were stopped: where the checkpoint is, or what went wrong."""
    errors = []
    for _, path in sorted(_Agent.error_files.items()):
        with contextlib.suppress(OSError, ValueError):
            errors.append(read_error(json.loads(Path(path).read_text(encoding="utf-8"))))
    found = [error for error in errors if error is not None]
    if found:
        write_error(max(found, key=lambda error: "checkpoint" in error.found))


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Pick the failure behind the others: a refusal, else a rank that was killed, else any error.

    torchelastic itself takes the earliest, but ranks that only lost another may be as early.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        rank, failure = item
        code = failure.exitcode
        if _was_ended(failure) or code == INTERRUPT_CODE:
            return 3, rank
        return (0 if code in _FINAL_CODES else 1 if code < 0 else 2), rank

    return min(failures.items(), key=order)


def _was_ended(failure: ProcessFailure) -> bool:
    """Whether this process ended the rank, because another one had failed."""
    return failure.local_rank in _Agent.ended and failure.exitcode not in _FINAL_CODES


def _conclude(failures: Mapping[int, ProcessFailure]) -> int:
    """Hand on what a rank wrote, or say what became of it; returns the exit code."""
    rank, failure = _cause(failures)
    aborted = failure.exitcode == -signal.SIGABRT and has_gpus()
    error = _abort_error(rank) if aborted else read_error(failure.error_file_data)
    deaf = sorted(
        rank
        for rank, other in failures.items()
        if _was_ended(other) and other.exitcode == -signal.SIGKILL
    )
    if deaf and (aborted or failure.exitcode == 1):
        return _hand_on(_stall_error(deaf, error))
    if failure.exitcode < 0:
        return _hand_on(error if error is not None else _kill_error(rank, failure))
    if error is not None:
        write_error(error)
    return int(failure.exitcode)


def _kill_error(rank: int, failure: ProcessFailure) -> DmtError:
    return DmtError(
        _describe(rank, failure),
        expected="every rank to run to its end",
        hint="look into the system's log (out of memory?); --max-restarts 3 goes on from "
        "the last checkpoint when a rank is lost",
    )


def _abort_error(rank: int) -> DmtError:
    """Say what NCCL's watchdog, a thread of torch, does to a rank that waits in vain."""
    return DmtError(
        f"rank {rank} was aborted (SIGABRT): an exchange over NCCL failed, or took longer than "
        "--timeout",
        expected="every rank to answer within --timeout",
        hint="what torch printed above names the exchange; look for a rank that failed or stalled "
        "on the other hosts, and at the network (NCCL_DEBUG=INFO); --max-restarts 3 goes on from "
        "the last checkpoint",
    )


def _stall_error(ranks: list[int], error: DmtError | None) -> DmtError:
    """Say that ranks neither went on nor ended when they were asked to."""
    names = ", ".join(map(str, ranks))
    seen = [] if error is None else [f"the others saw: {error.found}"]
    return DmtError(
        f"rank {names} stalled: it neither went on nor reacted to a signal, and was killed",
        expected="every rank to answer within --timeout",
        hint="look at what that process waited for (a file system, a debugger, a full machine); "
        "run it again with --resume, or with --max-restarts 3 to go on by itself",
        details=seen,
    )


def _describe(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"rank {rank} was killed ({signal.Signals(-failure.exitcode).name})"
    return f"rank {rank} ended with exit code {failure.exitcode}"


def _rendezvous_error(options: Any, error: Exception) -> DmtError:
    """Say that hosts did not meet, or parted."""
    if isinstance(error, RendezvousClosedError):
        return DmtError(
            "another host ended the training",
            expected="every host to train to the end",
            hint="what that host printed says why",
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(
        f"the {options.nnodes} hosts did not meet at {options.rdzv_endpoint} ({reason[:160]})",
        expected="every host to launch the same training within the time of --rdzv-timeout",
        hint="check that all hosts are started, with different --node-rank, and reach host 0 at "
        "that port; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network",
    )


def _hand_on(error: DmtError) -> int:
    write_error(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
