"""Measured steps of emulated clusters, read from what `benchmarks/cluster` writes.

Of its results.json this reads `schema_version` (1), `machine.cores`, of `settings` batch, pooling,
features, dim and compute_ms, and of every topology's rows rate_mbit, variant, step_ms, and where
they are there cpu_ms and link_mb.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmt_convert.errors import DataError

_VARIANT = re.compile(r"(flat|sptt|torchrec-towers|dmt)(?:-c(\d+(?:\.\d+)?))?(-prefetch)?(-bf16)?")
_SETTINGS = ("batch", "pooling", "features", "dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One variant at one link rate on one topology."""

    hosts: int
    ranks: int
    """Per host."""
    cores: int
    """That all ranks share."""
    rate_mbit: float
    """Of every host's link."""
    variant: str
    batch: int
    """Samples per rank."""
    pooling: float
    """Ids per feature."""
    features: int
    dim: int
    compute_ms: float
    """A sleep that stands for an accelerator, part of the step."""
    step_ms: float
    """Median."""
    cpu_ms: float | None
    """Per step, all ranks together."""
    link_mb: float | None
    """10^6 bytes per step over the busiest host's link, in one direction, headers included."""

    @property
    def topology(self) -> str:
        return f"{self.hosts}x{self.ranks}"

    @property
    def kind(self) -> str:
        """flat, sptt, torchrec-towers or dmt."""
        return self._parts()[0]

    @property
    def compression(self) -> float:
        return float(self._parts()[1] or 1)

    @property
    def element_bytes(self) -> int:
        """Of embeddings and their gradients on the way."""
        return 2 if self._parts()[2] else 4

    @property
    def label(self) -> str:
        return f"{self.topology} {self.rate_mbit:g} Mbit {self.variant}"

    def _parts(self) -> tuple[str, str | None, str | None]:
        found = _VARIANT.fullmatch(self.variant)
        assert found is not None
        return found[1], found[2], found[4]


def read_runs(path: Path) -> list[Run]:
    """Read a file of results.

    Raises:
        DataError: It is no such file, or a row is none; all that is wrong is listed.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["schema_version"] != 1:
            raise ValueError(f"schema_version {value['schema_version']!r}")
        settings, cores = value["settings"], int(value["machine"]["cores"])
        launches = [(launch["topology"], launch["rows"]) for launch in value["topologies"]]
        base = {name: float(settings[name]) for name in _SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refusal(f"{path} cannot be read ({error!r})", []) from None
    runs, problems = [], []
    for topology, rows in launches:
        for i, row in enumerate(rows):
            try:
                compute = float(settings.get("compute_ms", 0.0))
                runs.append(_run(topology, row, base, compute, cores))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"{topology}, row {i}: {error!r}")
    if problems or not runs:
        found = f"{len(problems)} rows that are none" if problems else "no rows"
        raise _refusal(f"{path} has {found}", problems[:20])
    return runs


def _refusal(found: str, details: list[str]) -> DataError:
    return DataError(
        found,
        expected="the results.json of benchmarks/cluster",
        hint="run that benchmark; the head of benchmarks/emulated_runs.py lists what is read",
        details=details,
    )


def _run(
    topology: Any, row: Mapping[str, Any], settings: Mapping[str, float], compute: float, cores: int
) -> Run:
    shape = re.fullmatch(r"(\d+)x(\d+)", topology)
    if shape is None or not _VARIANT.fullmatch(row["variant"]):
        raise ValueError(f"topology {topology!r}, variant {row['variant']!r}")
    numbers = {
        **settings,
        "hosts": float(shape[1]),
        "ranks": float(shape[2]),
        "cores": float(cores),
        "rate_mbit": float(row["rate_mbit"]),
        "step_ms": float(row["step_ms"]),
    }
    optional = {
        name: None if row.get(name) is None else float(row[name]) for name in ("cpu_ms", "link_mb")
    }
    known = numbers | {name: value for name, value in optional.items() if value is not None}
    wrong = [name for name, value in known.items() if not (math.isfinite(value) and value > 0)]
    if wrong or not (math.isfinite(compute) and 0 <= compute < numbers["step_ms"]):
        raise ValueError(f"no such numbers: {', '.join(wrong) or 'compute_ms'}")
    whole = {
        n: int(numbers.pop(n)) for n in ("hosts", "ranks", "cores", "batch", "features", "dim")
    }
    return Run(variant=row["variant"], compute_ms=compute, **whole, **numbers, **optional)
