"""What a self-test found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from dmt_convert import __version__

Status = Literal["ok", "differs", "mend", "skipped"]
REPORT: Final = "selftest.json"
_WORDS: Final = {"ok": "ok", "differs": "FAILED", "mend": "FAILED", "skipped": "skipped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one check found."""

    status: Status
    """differs: something is wrong. mend: the machine lacks something that the user can mend."""
    line: str
    """In one line."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Figures, and what is wrong in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """A check that was run, or skipped."""

    name: str
    """Its name."""
    outcome: Outcome
    """What it found."""
    seconds: float
    """How long it took."""

    @property
    def line(self) -> str:
        """One line for people."""
        word, outcome = _WORDS[self.outcome.status], self.outcome
        text = f"({outcome.line})" if outcome.status == "skipped" else outcome.line
        return f"{self.name:<12} {word:<8} {text}" + f"  {self.seconds:.0f} s" * (
            outcome.status != "skipped"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestReport:
    """All checks of a self-test."""

    results: tuple[CheckResult, ...]
    """In the order in which they were run."""

    @property
    def exit_code(self) -> int:
        """0: all is well. 4: a check differs. 3: something is to be mended."""
        found = {result.outcome.status for result in self.results}
        return 4 if "differs" in found else 3 if "mend" in found else 0

    @property
    def verdict(self) -> str:
        """In one line."""
        bad = [r.name for r in self.results if r.outcome.status in ("differs", "mend")]
        left = [r.name for r in self.results if r.outcome.status == "skipped"]
        text = f"does not work: {', '.join(bad)}" if bad else "works"
        return text + (f"; not checked: {', '.join(left)}" if left else "")

    def to_json(self) -> dict[str, Any]:
        """Return what `selftest.json` holds."""
        return {
            "tool": {"name": "dmt-convert", "version": __version__},
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "checks": [
                {"name": r.name, "seconds": round(r.seconds, 2), **asdict(r.outcome)}
                for r in self.results
            ],
        }

    def write(self, folder: Path) -> Path:
        """Write `selftest.json`; one that is there is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / REPORT
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path
