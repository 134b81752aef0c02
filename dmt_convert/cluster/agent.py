"""torchrun, ending with one clear error instead of its own traceback.

    python -m dmt_convert.cluster.agent TORCHRUN_ARGUMENTS RECIPE RECIPE_ARGUMENTS

takes what `python -m torch.distributed.run` takes. Ranks that refuse (exit codes 2 and 3) are not
started again. Of all ranks that failed, the one behind it gives the exit code and the error, which
is left in the agent's own error file for the launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from dmt_convert.cluster.rank_process import (
    INTERRUPT_CODE,
    die_with_parent,
    read_error,
    write_error,
)
from dmt_convert.errors import ConfigError, DmtError

_FINAL_CODES: Final = frozenset({2, 3})
"""Exit codes after which a new start cannot help: usage, and what the user has to mend."""
_ENDED_BY_AGENT: Final = frozenset({-signal.SIGTERM, 128 + signal.SIGTERM, INTERRUPT_CODE})
"""Exit codes of ranks that the agent ended."""


class _Agent(LocalElasticAgent):
    """Starts ranks again only if that can help, and says so."""

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
    if os.environ.get("DMT_TRACEBACK") != "1":
        logging.disable(logging.CRITICAL)  # torchrun's own account of the same failure
    setattr(import_module("torch.distributed.launcher.api"), "LocalElasticAgent", _Agent)  # noqa: B010
    run = import_module("torch.distributed.run")  # neither module has types
    options = run.parse_args(arguments)
    try:
        run.run(options)
    except ChildFailedError as error:
        return _conclude(*_cause(error.failures))
    except (RendezvousError, DistError) as error:
        return _hand_on(_rendezvous_error(options, error))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Pick the failure behind the others: a refusal, else a rank that was killed, else any error.

    torchelastic itself takes the earliest, but ranks that only lost another may be as early.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        rank, code = item[0], item[1].exitcode
        if code in _ENDED_BY_AGENT:
            return 3, rank
        return (0 if code in _FINAL_CODES else 1 if code < 0 else 2), rank

    return min(failures.items(), key=order)


def _conclude(rank: int, failure: ProcessFailure) -> int:
    """Hand on what a rank wrote, or say what became of it; returns the exit code."""
    if failure.exitcode < 0:
        return _hand_on(
            DmtError(
                _describe(rank, failure),
                expected="every rank to run to its end",
                hint="look into the system's log (out of memory?); --max-restarts 3 goes on from "
                "the last checkpoint when a rank is lost",
            )
        )
    error = read_error(failure.error_file_data)
    if error is not None and failure.exitcode != INTERRUPT_CODE:
        write_error(error)
    return int(failure.exitcode)


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
