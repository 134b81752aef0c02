"""One faulty input: what is known of it, and the verdict of every command that is run on it."""

from __future__ import annotations

import logging
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["right", "refused", "asked", "SILENT", "CRASH"]
VERDICTS: tuple[Verdict, ...] = ("right", "refused", "asked", "SILENT", "CRASH")
"""SILENT: it ended well, and what came out is wrong. CRASH: anything but an answer or a refusal."""

Logits = npt.NDArray[np.float32]

_QUESTION = re.compile(r"--model-config|`\w+: ")
"""A hint with a line to write: the command asks for a fact."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one command made of an input."""

    command: str
    verdict: Verdict
    said: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass
class Case:
    """A faulty input in a folder of its own, made from a seed."""

    kind: str
    number: int
    seed: int
    folder: Path
    shared: Path
    """Folder of what all cases may read: it is made once."""
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed} {self.kind} {self.number}")

    def choose(self, *options: Any) -> Any:
        """Draw one of some options."""
        return self.rng.choice(options)

    def turn(self, *options: Any) -> Any:
        """Take the options in turn, from case to case."""
        return options[self.number % len(options)]

    def run(self, command: str, work: Callable[[], str | None], *, named: str = "") -> bool:
        """Run a command and note its verdict.

        Args:
            command: Its name in the table.
            work: Runs it; returns what is wrong with its answer, or nothing.
            named: A wrong answer counts as refused if a warning names this.

        Returns:
            Whether it answered, and rightly.
        """
        warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("dmt_convert")
        logger.addHandler(handler)
        try:
            verdict, said = self._judge(work)
        finally:
            logger.removeHandler(handler)
        if verdict == "SILENT" and named and any(named in text for text in warnings):
            verdict, said = "refused", "warned: " + " ".join(warnings)
        self.outcomes.append(Outcome(command=command, verdict=verdict, said=said))
        return verdict == "right"

    @staticmethod
    def _judge(work: Callable[[], str | None]) -> tuple[Verdict, str]:
        from dmt_convert.errors import DmtError

        try:
            wrong = work()
        except DmtError as error:
            if "MemoryError" in str(error):
                return "CRASH", str(error)
            if not (error.found and (error.expected or error.hint)):
                return "CRASH", f"a refusal of one part: {error}"
            return ("asked" if _QUESTION.search(error.hint) else "refused"), str(error)
        except OSError as error:
            if error.strerror:  # `dmt` makes a refusal of it
                return "refused", str(error)
            return "CRASH", where(error)
        except BaseException as error:
            return "CRASH", where(error)
        return ("SILENT", wrong) if wrong else ("right", "")


def where(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-4)).replace("\n", " | ")


def difference(got: Logits, truth: Logits, tolerance: float) -> str | None:
    """Say how logits differ from the truth, or nothing if they are equal within a tolerance.

    Args:
        got: Logits, shape (B,).
        truth: Those of the model without the fault, shape (B,).
        tolerance: Largest difference, relative to the largest true logit.
    """
    if got.shape != truth.shape:
        return f"{got.shape} logits, not {truth.shape}"
    if not np.isfinite(got).all():
        return f"{(~np.isfinite(got)).sum()} of {len(got)} logits are not finite"
    scale, off = float(np.abs(truth).max()), float(np.abs(got - truth).max())
    return f"off by {off:.3g} (scale {scale:.3g})" if off > tolerance * scale else None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault."""

    name: str
    area: str
    make: Callable[[Case], None]
    share: int
    """How often it is drawn, relative to others."""


FAULTS: dict[str, Fault] = {}


def fault(area: str, name: str, *, share: int = 1) -> Callable[[Callable[[Case], None]], Any]:
    """Register a function that makes an input with this kind of fault, and runs the commands."""

    def register(make: Callable[[Case], None]) -> Callable[[Case], None]:
        assert name not in FAULTS, name
        FAULTS[name] = Fault(name=name, area=area, make=make, share=share)
        return make

    return register
