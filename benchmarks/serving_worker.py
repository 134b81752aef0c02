"""A process that serves one variant and is asked over pipes: `python serving_worker.py JOB`.

One process per variant, so that their memory does not add up, and all alive at the same time, so
that they can take turns. Every request is a line of JSON, and so is every answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from serving_case import Case, count_inputs, draw_inputs
from serving_variants import Opened, build_graph, find_variant, open_variant

from dmt_convert.serving.load_pt2 import keep_freed_memory

_WARM_SECONDS: Final = 4.0
_PARENT_DEATH_SIGNAL: Final = 1


class Server:
    """Answers the requests of the benchmark.

    Args:
        job: folder, variant, case.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._folder = Path(job["folder"])
        self._variant = find_variant(job["variant"])
        self._case = Case(**job["case"])
        self._opened: Opened | None = None
        self._threads = 0
        self._prepared: list[Any] = []
        self._next = 0

    def open(self, threads: int) -> dict[str, Any]:
        """Open the variant, or open it anew with another number of threads."""
        if threads != self._threads:
            self._prepared, self._opened = [], None
            begin = time.perf_counter()
            self._opened = open_variant(self._folder, self._variant, self._case, threads)
            self._threads = threads
            return {"seconds": time.perf_counter() - begin}
        return {}

    def prepare(self, batch: int) -> dict[str, Any]:
        """Make the batches of one size, and run them once: pages are mapped, caches are filled."""
        assert self._opened is not None
        make, run = self._opened
        self._prepared = []
        count = count_inputs(self._case.form, batch)
        self._prepared = [make(draw_inputs(self._case, batch, i)) for i in range(count)]
        self._next = 0
        begin = time.perf_counter()
        for inputs in self._prepared:
            run(inputs)
            if time.perf_counter() - begin > _WARM_SECONDS:
                break
        return {}

    def time(self, calls: int, skip: int) -> dict[str, Any]:
        """Run so many batches in turn; the first ones are not counted."""
        assert self._opened is not None
        run = self._opened[1]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        seconds = []
        for i in range(skip + calls):
            inputs = self._prepared[self._next]
            self._next = (self._next + 1) % len(self._prepared)
            begin = time.perf_counter()
            run(inputs)
            taken = time.perf_counter() - begin
            if i >= skip:
                seconds.append(taken)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        return {"seconds": seconds, "major_faults": after - before}

    def answer(self, batch: int, path: str) -> dict[str, Any]:
        """Write what the variant gives for the first batch of a size."""
        assert self._opened is not None
        make, run = self._opened
        output = np.asarray(run(make(draw_inputs(self._case, batch, 0))))
        np.save(path, output.reshape(batch, -1))
        return {}

    def memory(self) -> dict[str, Any]:
        """Say how much memory the process holds for itself, in MiB."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return {"anonymous_mib": int(line.split()[1]) / 1024}


def build(job: dict[str, Any]) -> None:
    """Write what variants need: the weights, or a graph."""
    from serving_weights import INT8_WEIGHTS, WEIGHTS, write_int8, write_weights

    folder = Path(job["folder"])
    case = Case(**job["case"])
    if not (folder / WEIGHTS).is_file():
        write_weights(folder / WEIGHTS, case.rows, case.seed)
    for name in job["variants"]:
        variant = find_variant(name)
        if variant.int8 and not (folder / INT8_WEIGHTS).is_file():
            write_int8(folder)
        build_graph(folder, variant, case, job["rival_python"])


def main(text: str) -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    job = json.loads(text)
    if "variants" in job:
        build(job)
        answers.write("{}\n")
        return
    keep_freed_memory()  # rivals too
    server = Server(job)
    for line in sys.stdin:
        request = json.loads(line)
        act: Callable[..., dict[str, Any]] = getattr(server, request.pop("do"))
        answers.write(json.dumps(act(**request)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
