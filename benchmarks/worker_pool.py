"""Jobs of a benchmark in several processes of one thread each.

Small models gain little from a second thread, and figures should not depend on how many there are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, what: str
) -> list[Result]:
    """Run every job; results in the order of the jobs, progress on stderr."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read by the processes' own libraries
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures: list[Future[Any]] = [pool.submit(function, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                seconds = time.perf_counter() - begin
                print(f"{what}: {done}/{len(jobs)}, {seconds:.0f} s", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    return [future.result() for future in futures]
