"""Measured steps of the emulated clusters, as `recipes/bench_cluster.py` writes them.

A file is {"rows": [...]} or the list itself. Each row has

    topology   "4x2", hosts x ranks per host      features  number of features
    link_mbit  rate of a host's link in Mbit/s    dim       embedding dim
    variant    flat, sptt, torchrec-towers-c4,    step_ms   median step
               dmt-c8, and the same with -bf16    cpu_ms    CPU time per step, all ranks (optional)
    batch      samples per rank                   link_mb   MB per host link and step (optional)
    pooling    ids per feature

Other names of the same things, in `_NAMES`, are read as well.
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

_NAMES = {
    "topology": ("topology", "cluster"),
    "link_mbit": ("link_mbit", "mbit", "rate_mbit"),
    "variant": ("variant", "name"),
    "batch": ("batch", "batch_size", "local_batch"),
    "pooling": ("pooling", "ids_per_bag"),
    "features": ("features", "num_features", "feature_count"),
    "dim": ("dim", "embedding_dim"),
    "step_ms": ("step_ms", "median_step_ms", "median_ms"),
    "cpu_ms": ("cpu_ms", "cpu_ms_per_step"),
    "link_mb": ("link_mb", "mb_per_link", "link_mb_per_step"),
}
_OPTIONAL = ("cpu_ms", "link_mb")
_VARIANT = re.compile(r"(flat|sptt|torchrec-towers|dmt)(?:-c(\d+(?:\.\d+)?))?(-bf16|-fp16)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row."""

    hosts: int
    ranks: int
    """Per host."""
    link_mbit: float
    variant: str
    batch: int
    """Samples per rank."""
    pooling: float
    features: int
    dim: int
    step_ms: float
    cpu_ms: float | None
    """All ranks together."""
    link_mb: float | None

    @property
    def topology(self) -> str:
        return f"{self.hosts}x{self.ranks}"

    @property
    def kind(self) -> str:
        """flat, sptt, torchrec-towers or dmt."""
        return self._parts[0]

    @property
    def compression(self) -> float:
        return float(self._parts[1] or 1)

    @property
    def element_bytes(self) -> int:
        return 2 if self._parts[2] else 4

    @property
    def _parts(self) -> tuple[str, str | None, str | None]:
        found = _VARIANT.fullmatch(self.variant)
        assert found is not None
        return found[1], found[2], found[3]

    @property
    def label(self) -> str:
        return f"{self.topology} {self.link_mbit:g} Mbit {self.variant}"


def read_runs(path: Path) -> list[Run]:
    """Read a file of rows.

    Raises:
        DataError: It is no such file, or a row is none; all that is wrong is listed.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(f"{path} cannot be read ({error})", []) from None
    rows = value.get("rows") if isinstance(value, Mapping) else value
    if not isinstance(rows, list) or not rows:
        raise _refusal(f"{path} holds no rows", [])
    runs, problems = [], []
    for i, row in enumerate(rows):
        try:
            runs.append(_run(row))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"row {i}: {error}")
    if problems:
        raise _refusal(f"{path} has {len(problems)} rows that are none", problems[:20])
    return runs


def _refusal(found: str, details: list[str]) -> DataError:
    return DataError(
        found,
        expected="the results.json of recipes/bench_cluster.py",
        hint="run the benchmark, or see the head of benchmarks/emulated_runs.py for the keys",
        details=details,
    )


def _run(row: Any) -> Run:
    if not isinstance(row, Mapping):
        raise TypeError("not an object")
    values = {}
    for name, names in _NAMES.items():
        given = next((row[key] for key in names if row.get(key) is not None), None)
        if given is None and name not in _OPTIONAL:
            raise KeyError(f"no {name}")
        values[name] = given
    shape = re.fullmatch(r"(\d+)x(\d+)", str(values["topology"]))
    if shape is None or not _VARIANT.fullmatch(str(values["variant"])):
        raise ValueError(f"topology {values['topology']!r}, variant {values['variant']!r}")
    numbers = {
        name: None if values[name] is None else float(values[name])
        for name in _NAMES
        if name not in ("topology", "variant")
    }
    wrong = [n for n, v in numbers.items() if v is not None and not (math.isfinite(v) and v > 0)]
    if wrong or min(int(shape[1]), int(shape[2])) < 1:
        raise ValueError(f"not positive: {', '.join(wrong) or 'topology'}")
    numbers |= {name: int(numbers[name] or 0) for name in ("batch", "features", "dim")}
    return Run(hosts=int(shape[1]), ranks=int(shape[2]), variant=str(values["variant"]), **numbers)
