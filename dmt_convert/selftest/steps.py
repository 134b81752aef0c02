"""What a training step costs: waits of the host for the GPU, and time."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from dmt_convert.errors import DmtError
from dmt_convert.placement.predict import GPUS
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.report import Outcome
from dmt_convert.selftest.training import BATCH, BUNDLE, STEP_COSTS

_WARM: Final = 5
"""Steps before anything is measured."""
_COUNTED: Final = 5
"""Steps whose waits are counted."""
_SYNC: Final = "synchronizing CUDA operation"
"""What torch says of an operation that makes the host wait."""


class StepMeter:
    """Measures the steps of a rank; rank 0 writes what they cost.

    Args:
        path: Where to.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._steps = path, 0
        self._seconds: list[float] = []
        self._places: Counter[str] = Counter()

    def measure(self, step: Callable[[], Any]) -> Any:
        """Take a step."""
        self._steps += 1
        on_gpu = torch.cuda.is_available()
        counted = on_gpu and _WARM < self._steps <= _WARM + _COUNTED
        begin = time.perf_counter()
        found = self._count(step) if counted else step()
        if on_gpu and not counted:
            torch.cuda.synchronize()
        if not counted and self._steps > _WARM:
            self._seconds.append(time.perf_counter() - begin)
            self._write()
        return found

    def _count(self, step: Callable[[], Any]) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for entry in caught:
            if _SYNC in str(entry.message):
                place = re.sub(r".*/((?:[^/]+/){0,2}[^/]+)$", r"\1", entry.filename)
                self._places[f"{place}:{entry.lineno}"] += 1
        return found

    def _write(self) -> None:
        if os.environ["RANK"] != "0":
            return
        document = {
            "seconds": self._seconds,
            "syncs": {place: count / _COUNTED for place, count in self._places.most_common()},
        }
        self._path.write_text(json.dumps(document), encoding="utf-8")


def check_syncs(context: Context) -> Outcome:
    """Say how often a step makes the host wait for the GPU, and where."""
    if context.device != "cuda":
        return Outcome(status="skipped", line="no GPU to wait for")
    syncs = _read(context)["syncs"]
    first = ", ".join(f"{count:g} at {place}" for place, count in list(syncs.items())[:3])
    line = f"{sum(syncs.values()):g} per step" + (f": {first}" if first else "")
    return Outcome(status="ok", line=line, details={"syncs": syncs})


def check_step(context: Context) -> Outcome:
    """Say how long a step takes, beside the prediction for such GPUs."""
    times = _read(context)["seconds"]
    found = median(times)
    details: dict[str, Any] = {"seconds": times, "predicted": None}
    line = f"{found * 1e3:.1f} ms for {BATCH} rows over {context.nproc} ranks"
    if context.device != "cuda":
        return Outcome(status="ok", line=f"{line}; CPUs are not predicted", details=details)
    try:
        details["predicted"] = _predict(context)
        line += f"; predicted {details['predicted'] * 1e3:.1f} ms"
    except DmtError as error:
        line += f"; not predicted ({error.found})"
    return Outcome(status="ok", line=line, details=details)


def _read(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((context.folder / STEP_COSTS).read_text(encoding="utf-8"))
    return found


def _predict(context: Context) -> float:
    """Return the modelled seconds of the bundle's step; only GPUs with a preset have one."""
    import dmt_convert as dmt

    name = torch.cuda.get_device_name().lower()
    known = [gpu.name for gpu in GPUS if gpu.name in name]
    if not known:
        raise DmtError(f"no preset for {name}")
    hosts = 2 if context.nproc > 1 and context.nproc % 2 == 0 else 1
    report = dmt.predict(
        context.folder / BUNDLE,
        predict=True,
        hosts=hosts,
        ranks_per_host=context.nproc // hosts,
        gpu=max(known, key=len),  # gb200 contains b200
        batch=BATCH // context.nproc,
    )
    if report.placed is None:
        raise DmtError("the plan has no modelled step")
    return report.placed.step.total
