"""How a rank tells the process that launched it what came of its work.

torchrun's own exit code is 1 whatever a rank's was, and its error a traceback. So the launcher
names a folder in the environment; a rank that ends writes one small JSON file there, in one step;
the launcher reads them once all ranks are gone, and says one thing to the user. No torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert import errors
from dmt_convert.errors import DmtError

FOLDER_VARIABLE: Final = "DMT_OUTCOME_FOLDER"
"""Environment variable that names the folder; absent where nobody reads it."""
FINAL_CODES: Final = frozenset({2, 3})
"""Exit codes after which starting the ranks again is of no use: usage, and what a user mends."""
_PR_SET_PDEATHSIG: Final = 1
_URGENCY: Final = {3: 0, 2: 1, 1: 2}
"""Which ranks' outcomes are told first, by exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a rank's work."""

    code: int
    """Its exit code, as `dmt` has them."""
    rank: int
    """The rank, over all hosts; -1 for the process that starts the ranks of a host."""
    attempt: int
    """How many times the ranks had been started before."""
    error: Mapping[str, Any] | None
    """What went wrong, as `DmtError.to_json` gives it."""
    result: Mapping[str, Any] | None
    """What was done."""


def write_outcome(
    code: int,
    *,
    error: DmtError | None = None,
    result: Mapping[str, Any] | None = None,
) -> bool:
    """Leave word for the launcher, where there is one; call it last before the process ends.

    Any rank may call it; a refusal that all ranks share is told once.

    Args:
        code: The exit code that follows.
        error: What went wrong, where the user can mend it.
        result: What `--json` prints; the first rank's.

    Returns:
        Whether a launcher will tell the user. Then the caller prints neither error nor result.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return False
    rank = int(os.environ.get("RANK", "-1"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    value = {
        "code": code,
        "rank": rank,
        "attempt": attempt,
        "error": None if error is None else error.to_json(),
        "result": None if result is None else dict(result),
    }
    path = Path(folder) / f"{attempt}-{rank}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.rename(path)
    except OSError:
        return False  # the launcher is gone, or the disk is full: then the caller speaks itself
    return True


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read what the ranks of the last attempt and the agent left, the most telling first."""
    found = [Outcome(**json.loads(path.read_text("utf-8"))) for path in folder.glob("*.json")]
    last = max((outcome.attempt for outcome in found), default=0)
    return sorted(
        (outcome for outcome in found if outcome.attempt == last or outcome.rank < 0),
        key=lambda outcome: (_URGENCY.get(outcome.code, 3), outcome.rank % (1 << 32)),
    )


def rebuild_error(value: Mapping[str, Any]) -> DmtError:
    """Make an error of what `DmtError.to_json` gave."""
    kind = getattr(errors, str(value["error"]), DmtError)
    made: DmtError = kind(
        value["found"], expected=value["expected"], hint=value["hint"], details=value["details"]
    )
    return made


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Get a signal when the parent process ends, however it ends.

    For ranks, whose parent is torchrun: where that is killed, nobody else would end them.

    Args:
        number: Which signal.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
