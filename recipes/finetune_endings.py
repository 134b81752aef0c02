"""How `finetune_dmt.py` ends: what it says, on one of the ranks of a host, and its exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from typing import Any, Final, NoReturn

from dmt_convert.cluster import await_end, die_with_parent, end_when_told, take_floor, write_outcome
from dmt_convert.errors import DmtError

_REFUSAL_CODE: Final = 3
_INTERRUPT_CODE: Final = 130
_LOST_CODE: Final = 1
_LOST_WORDS: Final = ("gloo", "NCCL", "Timed out", "timeout", "Connection", "Broken pipe", "rank")
_GRACE_SECONDS: Final = 3.0
"""How long a rank that lost another waits for that one to say why."""
_GO_ON: Final = (
    "look at what was printed before; --resume goes on from the last whole checkpoint, and with "
    "--max-restarts torchrun does so by itself"
)
_KNOWN: Final[list[DmtError]] = []
"""What this rank knows of the loss of another."""


def find_rank() -> int | None:
    """This process's rank, None where it is the only one."""
    text = os.environ.get("RANK", "")
    alone = os.environ.get("WORLD_SIZE") == "1" and "LOCAL_RANK" not in os.environ
    return int(text) if text.isdecimal() and not alone else None


def end_with_torchrun(options: argparse.Namespace) -> None:
    """Let this rank end when torchrun tells it to, or is gone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    end_when_told(lambda number: _end_told(options, number))


def refuse(options: argparse.Namespace, error: DmtError) -> NoReturn:
    """Say what the user can mend, with `--json` also as a document, and end."""
    _end(_REFUSAL_CODE, at_once=_tell(options, error, code=_REFUSAL_CODE))


def interrupt(options: argparse.Namespace) -> NoReturn:
    """End after an interrupt."""
    error = DmtError("interrupted", expected="to run to the end", hint="run it again")
    text = "interrupted; nothing half-written was left in place"
    _end(_INTERRUPT_CODE, at_once=_tell(options, error, text=text, code=_INTERRUPT_CODE))


def is_loss(error: RuntimeError) -> bool:
    """Whether an error means that another rank is gone."""
    return any(word in str(error) for word in _LOST_WORDS)


def lose(options: argparse.Namespace, error: RuntimeError) -> NoReturn:
    """End because another rank has: it says why, or was killed."""
    if os.environ.get("DMT_TRACEBACK") == "1":
        traceback.print_exception(error)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[[^]]*\] ", "", reason).partition(". ")[0]  # where in gloo's source, advice
    lost = DmtError(
        f"another rank was lost, or did not answer within {options.timeout:g} s ({reason:.160})",
        expected="every rank to run to its end",
        hint=_GO_ON,
    )
    _KNOWN.append(lost)
    _tell(options, lost, code=_LOST_CODE, grace=_GRACE_SECONDS)
    _end(_LOST_CODE, at_once=False)


def fail(error: BaseException) -> NoReturn:
    """End because of a bug, on a rank: others are not waited for."""
    if take_floor():
        traceback.print_exception(error)
    _end(_LOST_CODE, at_once=True)


def _tell(
    options: argparse.Namespace,
    error: DmtError,
    *,
    code: int,
    text: str | None = None,
    grace: float = 0.0,
) -> bool:
    """Tell the launcher, where there is one; else the user, unless another rank has.

    Returns:
        Whether somebody was told.
    """
    if write_outcome(code, error=error):
        return True
    if find_rank() is not None and not take_floor(grace):
        return False
    if options.json:
        print(json.dumps(error.to_json(), indent=1, ensure_ascii=False), flush=True)
    print(f"error: {text or error}", file=sys.stderr, flush=True)
    return True


def _end_told(options: argparse.Namespace, number: signal.Signals) -> None:
    """Say, unless a rank has said more, that this one was told to end."""
    told = DmtError(
        f"told to end ({number.name}): another rank was lost, or somebody stopped the training",
        expected="to run to the end",
        hint=_GO_ON,
    )
    _tell(options, _KNOWN[0] if _KNOWN else told, code=_INTERRUPT_CODE, grace=0.2)
    os._exit(_INTERRUPT_CODE)


def _end(code: int, *, at_once: bool) -> NoReturn:
    if find_rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if not at_once:
        await_end()
    os._exit(code)  # other ranks may be gone: nothing here waits for them


def say_done(options: argparse.Namespace, result: dict[str, Any] | None) -> None:
    """Hand the result to the launcher, where there is one; else, with `--json`, to the user."""
    if not write_outcome(0, result=result) and options.json and result is not None:
        print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
