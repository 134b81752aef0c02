"""How a process of a training ends: one message to the user, and an exit code as `dmt` has them.

A rank leaves its error in the file that torchelastic names (`TORCHELASTIC_ERROR_FILE`). With
`dmt finetune`, the agent (`agent.py`) picks the error behind all others and the launcher reports
it. Under plain torchrun one rank of each host prints it: most errors are met by all ranks alike,
and the loss of one rank by all others. No torch.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from dmt_convert.cluster.faults import explain_gpu, is_loss, reason
from dmt_convert.cluster.requirements import lacking_error, missing_packages
from dmt_convert.errors import DmtError

LAUNCHED: Final = "DMT_LAUNCHED"
"""Environment variable that the launcher sets: it reports what ranks leave in error files."""
ERROR_FILE: Final = "TORCHELASTIC_ERROR_FILE"
GRACE: Final = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable of torchrun: seconds from its signal to ranks until it kills them."""
INTERRUPT_CODE: Final = 130
_DEFAULT_GRACE: Final = 30.0
_GRACE_SHARE: Final = 0.9
"""The part of the grace time in which a rank stops by itself; the rest is for its last words."""
_SOFT: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
"""Signals that ask a training to stop. Schedulers send them before they kill."""
_REPORTED: Final = "dmt-reported"
"""File beside the error files of a host's ranks; the rank that makes it prints its error."""
_ABORT_SECONDS: Final = 5.0
"""How long a rank that lost another waits until torchrun ends it."""
_GRACE_SECONDS: Final = 3.0
"""How long such a rank lets others, which may know the cause, report before it does."""
_PR_SET_PDEATHSIG: Final = 1


class LostRankError(DmtError):
    """Another rank is gone, or does not answer."""

    exit_code = 1


class InterruptError(DmtError):
    """The process was interrupted."""

    exit_code = INTERRUPT_CODE


def current_rank() -> int | None:
    """Return this process's rank, or None if it is the only one."""
    text = os.environ.get("RANK", "")
    alone = os.environ.get("WORLD_SIZE") == "1" and "LOCAL_RANK" not in os.environ
    return int(text) if text.isdecimal() and not alone else None


class StopRequest:
    """A signal that asked this process to stop, for a loop that looks for it between its steps."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that came; None: none."""
        self._is_watched = False

    @contextmanager
    def watch(self) -> Iterator[StopRequest]:
        """While this lasts, a signal is only noted; the loop has to stop in the grace time."""
        self._is_watched = True
        try:
            yield self
        finally:
            self._is_watched = False

    def note(self, number: signal.Signals) -> bool:
        """Note a signal; returns whether a loop looks for it."""
        if self._is_watched and self.signal is None:
            self.signal = number
        return self._is_watched


STOP_REQUEST: Final = StopRequest()
"""That of this process."""


@contextmanager
def training_process(*, json_errors: bool, quiet: bool, timeout: float) -> Iterator[None]:
    """Run a training; whatever escapes becomes one message and the process's exit code.

    Args:
        json_errors: Also print an error as a JSON document to stdout.
        quiet: Log errors only.
        timeout: Seconds that ranks wait for each other.
    """
    rank = current_rank()
    _start_logging(quiet=quiet or rank not in (None, 0), propagate=rank is None)
    end = _End(is_rank=rank is not None, json_errors=json_errors)
    if rank is None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)
    else:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()
        _handle_signals(end)
        if os.environ.get("DMT_TRACEBACK") != "1":
            _silence_libraries()
    try:
        yield
    except DmtError as error:
        end.refuse(error)
    except OSError as error:
        end.refuse(_file_error(error))
    except KeyboardInterrupt:
        hint = (
            "run it again; nothing half-written was left in place. Training in one process keeps "
            "no checkpoints: `dmt finetune --nproc 1` does, and goes on with --resume"
        )
        end.refuse(InterruptError("interrupted", hint=hint))
    except ModuleNotFoundError as error:
        lacking = missing_packages()
        if (error.name or "").partition(".")[0] not in lacking:
            raise
        end.refuse(lacking_error(lacking))
    except Exception as error:
        if rank is None:
            raise
        told = explain_gpu(error, rank)
        if told is not None:
            end.refuse(told)
        if is_loss(error):
            end.lose(error, timeout)
        end.fail(error)


class _End:
    """The ways in which a process ends."""

    def __init__(self, *, is_rank: bool, json_errors: bool) -> None:
        self._is_rank, self._json_errors = is_rank, json_errors
        self._loss: LostRankError | None = None

    @property
    def is_lost(self) -> bool:
        """Whether this process ends because another rank has."""
        return self._loss is not None

    def refuse(self, error: DmtError) -> NoReturn:
        """End with something that the user can mend."""
        _exit(error.exit_code, is_rank=self._is_rank, wait=not self._report(error))

    def lose(self, error: Exception, timeout: float) -> NoReturn:
        """End because another rank has; that one may report why, unless it was killed."""
        if os.environ.get("DMT_TRACEBACK") == "1":
            traceback.print_exception(error)
        self._loss = LostRankError(
            f"another rank was lost, or did not answer within {timeout:g} s ({reason(error)})",
            expected="every rank to run to its end",
            hint=_RESUME_HINT,
        )
        self._report(self._loss, grace=_GRACE_SECONDS)
        # torchrun takes the first exit code for the cause: leave that to the rank that was lost
        _exit(self._loss.exit_code, is_rank=True, wait=True)

    def fail(self, error: BaseException) -> NoReturn:
        """End with a bug."""
        if _claim_report():
            traceback.print_exception(error)
        _exit(1, is_rank=True, wait=False)

    def stop(self, number: signal.Signals) -> None:
        """End on a signal, from another thread than the main one."""
        what = "another rank was lost, or somebody stopped the training"
        if STOP_REQUEST.signal is not None:
            what = "no checkpoint could be written within the grace time"
        stopped = InterruptError(
            f"ended by {number.name}: {what}",
            expected="every rank to run to its end",
            hint=_RESUME_HINT,
        )
        self._report(self._loss or stopped, grace=0.2)
        os._exit(INTERRUPT_CODE)

    def _report(self, error: DmtError, *, grace: float = 0.0) -> bool:
        """Hand an error to the launcher, or print it unless another rank reports.

        Returns:
            Whether this process reported it.
        """
        if write_error(error) and LAUNCHED in os.environ:
            return True
        if self._is_rank and not _claim_report(grace):
            return False
        if self._json_errors:
            document = json.dumps(error.to_json(), indent=1, ensure_ascii=False)
            sys.stdout.write(f"{document}\n")
        sys.stderr.write(f"error: {error}\n")
        return True


_RESUME_HINT: Final = (
    "read what was printed before; --resume goes on from the last whole checkpoint, and with "
    "--max-restarts torchrun does so by itself"
)


def write_error(error: DmtError) -> bool:
    """Leave an error for the parent process, in torchelastic's format.

    Returns:
        Whether it was written; False if no parent reads it.
    """
    name = os.environ.get(ERROR_FILE)
    if not name:
        return False
    extra = {
        "timestamp": str(int(time.time())),
        "py_callstack": error.found,  # what torchrun prints in its own summary
        "dmt_error": error.to_json(),
    }
    document = {"message": {"message": error.found, "extraInfo": extra}}
    path = Path(name)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.rename(path)  # the agent must not read half of it
    except OSError:
        return False
    return True


def read_error(document: Mapping[str, Any]) -> DmtError | None:
    """Return the error in what an error file holds; None if another program wrote it."""
    message = document.get("message")
    extra = message.get("extraInfo", {}) if isinstance(message, Mapping) else {}
    return DmtError.from_json(extra["dmt_error"]) if "dmt_error" in extra else None


def _claim_report(grace: float = 0.0) -> bool:
    """Return whether this rank is to report; one rank of a host is, per start of the ranks.

    Args:
        grace: Seconds in which another rank, which knows more, may come first.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    name = os.environ.get(ERROR_FILE)
    if not name:
        return is_first
    claim = Path(name).parent.parent / _REPORTED
    end = time.monotonic() + grace
    while time.monotonic() < end and not claim.exists():
        time.sleep(0.05)
    try:
        claim.touch(exist_ok=False)  # O_EXCL: one of the ranks succeeds
    except FileExistsError:
        return False
    except OSError:
        return is_first
    return True


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Get a signal when the parent process ends, however it ends.

    A rank's parent is torchrun: if that is killed, nobody else would end the ranks.

    Args:
        number: Which signal.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _handle_signals(end: _End) -> None:
    """Handle signals in a thread of their own: the main one may wait in a collective.

    A training loop is asked to stop, and has the grace time to do so; anything else is ended at
    once. So is a loop that lost another rank, or that torchrun ends because of one (SIGHUP).

    To be called before other threads are started, which inherit the blocked signals.
    """
    signals = {*_SOFT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        first = signal.Signals(signal.sigwait(signals))
        if first in _SOFT and STOP_REQUEST.note(first):
            deadline = time.monotonic() + _GRACE_SHARE * _read_grace()
            while time.monotonic() < deadline and not end.is_lost:
                more = signal.sigtimedwait(signals, 0.2)
                if more is not None and more.si_signo not in _SOFT:
                    break
        end.stop(first)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _read_grace() -> float:
    try:
        return max(1.0, float(os.environ[GRACE]))
    except (KeyError, ValueError):
        return _DEFAULT_GRACE


def _exit(code: int, *, is_rank: bool, wait: bool) -> NoReturn:
    """End the process.

    Args:
        code: Exit code.
        is_rank: Whether it is one of several.
        wait: Let torchrun end it, so that its exit code hides no other rank's.
    """
    if not is_rank:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if wait and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_ABORT_SECONDS)
    os._exit(code)  # destructors of process groups would wait for ranks that are gone


def _file_error(error: OSError) -> DmtError:
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return DmtError(
        f"{where}{error.strerror or error}",
        expected="files and folders that can be read and written",
        hint="check the path, its owner and its permissions; nothing half-written was left",
    )


def _start_logging(*, quiet: bool, propagate: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("dmt_convert")
    logger.handlers = [handler]
    logger.propagate = propagate  # torchrec sets up the root logger, which would print it again
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def _silence_libraries() -> None:
    """Keep warnings that torch and torchrec mean for their own developers off the terminal.

    And tracebacks of threads that met an error of the file system: TensorBoard's writer raises it
    again where the next value is logged.
    """
    warnings.simplefilter("ignore")
    threading.excepthook = _hide_os_errors
    for name in ("torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _hide_os_errors(met: threading.ExceptHookArgs) -> None:
    if not isinstance(met.exc_value, OSError):
        threading.__excepthook__(met)
