"""The format pt2: every graph an AOTInductor package, its weights beside it.

A package holds machine code and no weights: `load_pt2.py`, which is copied into the export, maps
the `.safetensors` files into memory and hands them over. Code for the CPU runs on every machine
with at least the vector instructions of the one that compiled it (AVX2 or AVX-512).

Packages for CUDA are compiled where CUDA is; no machine that this was tested on had it.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final

import torch

from dmt_convert.adapter import user_file
from dmt_convert.errors import ExportError
from dmt_convert.serving import load_pt2
from dmt_convert.serving.export_config import ExportConfig
from dmt_convert.serving.export_manifest import OVER_ARCH, WHOLE, ExportFormat, tower_name
from dmt_convert.serving.graph_writer import ExportJob, Written
from dmt_convert.serving.pt2_compile import CompileJob

LOADER: Final = "load_pt2.py"
_MAX_WORKERS: Final = 2
"""Compiler processes at a time: each takes up to 1 GB and a core."""


class Pt2Writer:
    """Compiles the graphs of an export.

    Args:
        config: What is asked for.

    Raises:
        ExportError: There is no C++ compiler, or no GPU for a graph that is to run on one.
    """

    format: ExportFormat = "pt2"

    def __init__(self, config: ExportConfig) -> None:
        # here, and not when graphs are written: weights may take long to be put in place
        if config.gpu:
            _check_gpu()
        self._compiler = _find_compiler()

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return part

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """See `GraphWriter.write`."""
        parts = {WHOLE: "whole.pt2"}
        parts |= {tower_name(t): f"{tower_name(t)}/tower.pt2" for t in range(len(job.spec.towers))}
        parts[OVER_ARCH] = f"{OVER_ARCH}/over_arch.pt2"
        compile_job = CompileJob(
            folder=str(job.folder),
            model=job.spec.to_json(),
            inputs=job.inputs.to_json(),
            towers=tuple(file.path for file in job.weights.towers),
            over_arch=job.weights.over_arch.path,
            parts=parts,
            packed=job.config.quantize == "int4",
            clip=job.config.out_of_range == "clip",
            device="cuda" if job.config.gpu else "cpu",
            model_file=str(user_file(job.spec.flat) or ""),
        )
        on_part(0, len(parts))
        for done, _ in enumerate(_compile(compile_job), start=1):
            on_part(done, len(parts))
        source = Path(load_pt2.__file__)
        (job.folder / LOADER).write_bytes(source.read_bytes())
        return Written(
            parts=parts,
            details={
                "torch": torch.__version__,
                "compiler": self._compiler,
                "device": compile_job.device,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "loader": LOADER,
            },
        )


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise ExportError(
            "a pt2 export for a GPU on a machine that has none",
            expected="a CUDA device and a build of torch for it: packages are compiled where they "
            "are exported",
            hint="export on a machine like the one that serves, or leave --gpu out",
        )


def _find_compiler() -> str:
    """Return the first line that the C++ compiler says of its version.

    Raises:
        ExportError: There is none.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is not None:
        asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout:
            return asked.stdout.splitlines()[0]
    raise ExportError(
        f"no C++ compiler: {name} cannot be run",
        expected="a compiler for AOTInductor, such as g++ 10 or later",
        hint="apt-get install g++, or name another one in the environment variable CXX; "
        "--format onnx needs none",
    )


def _compile(job: CompileJob) -> Iterator[str]:
    """Compile all parts, in processes of their own; yield their names as they get done.

    Raises:
        ExportError: A part cannot be compiled.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for part in job.parts:
        waiting.put(part)
    done: queue.SimpleQueue[str | ExportError] = queue.SimpleQueue()
    count = min(_MAX_WORKERS, len(os.sched_getaffinity(0)), len(job.parts))
    workers: list[Worker] = []
    threads: list[threading.Thread] = []
    with ExitStack() as logs:
        try:
            for _ in range(count):
                workers.append(_start(job, logs))
                threads.append(threading.Thread(target=_feed, args=(*workers[-1], waiting, done)))
                threads[-1].start()
            for _ in job.parts:
                answer = done.get()
                if isinstance(answer, ExportError):
                    raise answer
                yield answer
        finally:
            _stop(workers, threads)


Worker = tuple["subprocess.Popen[str]", IO[str]]


def _start(job: CompileJob, logs: ExitStack) -> Worker:
    log = logs.enter_context(
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dmt_convert.serving.pt2_compile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(job.to_json() + "\n")
    return process, log


def _stop(workers: Sequence[Worker], threads: Sequence[threading.Thread]) -> None:
    """End the processes, and with them the compilers that they may have started."""
    for process, _ in workers:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    for process, _ in workers:
        process.communicate()


def _feed(
    process: subprocess.Popen[str],
    log: IO[str],
    waiting: queue.SimpleQueue[str],
    done: queue.SimpleQueue[str | ExportError],
) -> None:
    """Give one process part after part until none is left, or it fails."""
    assert process.stdin is not None and process.stdout is not None
    while True:
        try:
            part = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(part + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it died, or was ended because another one failed
            answer = ""
        if not answer:
            done.put(_failed(part, process, log))
            return
        done.put(str(json.loads(answer)["part"]))


def _failed(part: str, process: subprocess.Popen[str], log: IO[str]) -> ExportError:
    code = process.wait()
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    return ExportError(
        f"the graph {part!r} cannot be compiled (the process ended with code {code})",
        expected="AOTInductor to compile every part",
        hint="see whether memory or disk ran out (a part takes about 1 GB); --format onnx does "
        "without a compiler; report it with the lines below",
        details=lines[-12:],
    )
