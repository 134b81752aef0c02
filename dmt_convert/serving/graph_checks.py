"""Run every exported graph against the model that it came from, in a process of its own.

A process of its own, because runtimes do not give their memory back, and because what kills one
must not kill the export.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmt_convert.errors import DataError, DmtError, ExportError, GraphsDifferError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCheck:
    """One check of one graph."""

    part: str
    """`whole`, `tower_000`, ..., `over_arch`, or `joined`: the towers' outputs into over_arch."""
    what: str
    """What it ran on, or what it must refuse."""
    rows: int
    """Rows compared."""
    max_abs_diff: float | None
    """Largest absolute difference from the model; None for a refusal."""
    limit: float | None
    """Largest difference allowed; None for a refusal."""
    passed: bool
    """Whether it held."""
    found: str = ""
    """What went wrong, where something did."""

    @property
    def line(self) -> str:
        """One line for people."""
        verdict = "ok" if self.passed else f"FAILED {self.found}".rstrip()
        if self.max_abs_diff is None:
            return f"{self.part}, {self.what}: {verdict}"
        return (
            f"{self.part}, {self.what}: max |diff| {self.max_abs_diff:.2g} of {self.limit:.2g} "
            f"allowed, {self.rows} rows: {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


def check_graphs(
    folder: Path,
    bundle: Path,
    data: Path | None,
    progress: Progress,
    model: Path | None = None,
) -> tuple[GraphCheck, ...]:
    """Run all graphs of an export.

    Args:
        folder: The export.
        bundle: The bundle that it was made of.
        data: Rows to run on, beside generated ones.
        progress: Told of checks done and in all.
        model: The user's file that defines the bundle's model, where there is one.

    Raises:
        GraphsDifferError: A graph does not answer like the model.
        ExportError: A graph cannot be loaded, or the process died.
        DataError: The data does not fit the model, or the form of the inputs.
    """
    command = [sys.executable, "-m", "dmt_convert.serving.check_process", str(folder), str(bundle)]
    command += ["" if path is None else str(path) for path in (data, model)]
    checks: list[GraphCheck] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            value = json.loads(line)
            if "error" in value:
                raise _error(value)
            checks.append(GraphCheck(**value["check"]))
            progress("running the graphs", len(checks), value["total"])
        process.wait()
        complaints.seek(0)
        complaint = complaints.read()
    if process.returncode != 0:
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        raise ExportError(
            f"the process that runs the graphs ended with code {process.returncode} ({last})",
            expected="every graph to run to its end",
            hint="free memory and try again; report it with what DMT_TRACEBACK=1 prints",
        )
    failed = [check for check in checks if not check.passed]
    if failed or not checks:
        raise GraphsDifferError(
            f"{len(failed)} of {len(checks)} checks failed: the graphs differ from the model",
            expected="the model's own outputs, within rounding",
            hint="this is a bug unless the model overflows on such inputs; report it. Nothing was "
            "left in place",
            details=[check.line for check in failed],
        )
    return tuple(checks)


def _error(value: Mapping[str, Any]) -> DmtError:
    kind = DataError if value["error"] == "DataError" else ExportError
    return kind(
        value["found"], expected=value["expected"], hint=value["hint"], details=value["details"]
    )
