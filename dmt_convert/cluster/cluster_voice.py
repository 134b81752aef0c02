"""Which rank of a host tells the user what went wrong, and how ranks end when they are told to.

Most errors are met by all ranks alike, and the loss of one by all others. torchrun ends the ranks
of a host once one has failed, so that the first to fail has to speak, and the others to wait for
their end. No torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_TOLD: Final = "dmt-told"
"""File beside those in which torchrun takes the errors of a host's ranks."""
_WAIT_SECONDS: Final = 5.0
"""How long a rank that has nothing to say waits for torchrun to end it."""


def take_floor(grace: float = 0.0) -> bool:
    """Ask whether this rank is to tell what went wrong; one rank of a host is told so.

    Args:
        grace: Seconds in which another rank, which knows more, may come first.
    """
    path = _claim()
    if path is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    end = time.monotonic() + grace
    while time.monotonic() < end and not path.exists():
        time.sleep(0.05)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return True


def _claim() -> Path | None:
    """The file that the rank which speaks makes: of this host, and of this start of the ranks."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / _TOLD if own else None


def await_end() -> None:
    """Wait for torchrun to end this rank, so that its exit code hides no other's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_WAIT_SECONDS)


def end_when_told(end: Callable[[signal.Signals], None]) -> None:
    """Call `end` on SIGTERM or SIGINT, from a thread: the main one may wait for other ranks.

    To be called before other threads are started.

    Args:
        end: Ends the process.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(
        target=lambda: end(signal.Signals(signal.sigwait(signals))), name="ends", daemon=True
    ).start()
