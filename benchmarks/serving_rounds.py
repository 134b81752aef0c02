"""Processes that take turns, so that what drifts on the machine hits all variants alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from serving_case import Case
from serving_variants import REFERENCES, Variant, find_variant

CHECK_ROWS: Final = 256
RTOL: Final = 2e-5
"""Of the largest value that eager torch gives: the limit within which an export must answer."""
INT8_RMS: Final = 0.05
"""int8 tables: root mean square of the difference, of the values' own spread."""
_SLICE_SECONDS: Final = 0.1
_ROUNDS: Final = 9
_LONG_CALL: Final = 0.3


class VariantError(Exception):
    """A variant cannot be built or run, or gives other logits."""


class Worker:
    """A variant in a process of its own."""

    def __init__(self, folder: Path, variant: Variant | None, case: Case, **job: Any) -> None:
        self.variant = variant
        name = "build" if variant is None else variant.name
        self._log: IO[bytes] = (folder / f"{name}.log").open("w+b")
        job |= {"folder": str(folder), "case": asdict(case)}
        if variant is not None:
            job["variant"] = variant.name
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serving_worker.py")), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Ask for something and wait for it.

        Raises:
            VariantError: The process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # then there is no answer either
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            VariantError: The process died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        raise VariantError(f"ended with code {code}: {said[-1] if said else 'no message'}")


def build_all(
    folder: Path, variants: Iterable[Variant], case: Case, rival_python: str
) -> list[Variant]:
    """Build what the variants need; returns those that can be had, the others are named."""
    ready = []
    for variant in variants:
        begin = time.perf_counter()
        job = {"variants": [variant.name], "rival_python": rival_python}
        with Worker(folder, None, case, **job) as worker:
            try:
                worker.answer()
            except VariantError as error:
                note(f"{case.model} {case.form}: {variant.name} is left out: {error}")
                continue
        if (seconds := time.perf_counter() - begin) > 10:
            note(f"{case.model} {case.form}: {variant.name} built in {seconds:.0f} s")
        ready.append(variant)
    return ready


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Timing:
    """Seconds of every counted call of one variant with one size of batch."""

    seconds: list[float]
    major_faults: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        self.seconds += answer["seconds"]
        self.major_faults += answer["major_faults"]


class Cell:
    """All variants of one case, alive."""

    def __init__(self, folder: Path, case: Case, variants: Sequence[Variant]) -> None:
        self.folder, self.case, self.variants = folder, case, variants
        self._stack = ExitStack()
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Cell:
        for variant in self.variants:
            worker = Worker(self.folder, variant, self.case)
            self.workers[variant.name] = self._stack.enter_context(worker)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def drop(self, name: str) -> None:
        """Go on without a variant."""
        self.workers.pop(name)

    def open(self, threads: int) -> None:
        """Open all variants with so many threads, one after the other."""
        for name, worker in list(self.workers.items()):
            try:
                worker.ask("open", threads=threads)
            except VariantError as error:
                note(f"{self.case.model} {self.case.form}: {name} is left out: {error}")
                self.drop(name)

    def check(self) -> dict[str, float]:
        """Compare what all variants give with eager torch.

        Returns:
            Variant -> difference as a share of its limit.

        Raises:
            VariantError: One differs.
        """
        answers = {name: self._answer(worker) for name, worker in self.workers.items()}
        shares = {}
        for name, found in answers.items():
            variant = find_variant(name)
            expected = self._reference(REFERENCES[variant.function], answers)
            shares[name] = _share(found, expected, variant.int8)
        wrong = {name: share for name, share in shares.items() if not share <= 1}
        if wrong:
            raise VariantError(
                f"{self.case}: other answers than eager torch, as multiples of the limit: {wrong}"
            )
        return shares

    def _answer(self, worker: Worker) -> npt.NDArray[np.float32]:
        path = self.folder / "answer.npy"
        worker.ask("answer", batch=CHECK_ROWS, path=str(path))
        answer: npt.NDArray[np.float32] = np.load(path)
        return answer

    def _reference(
        self, name: str, answers: dict[str, npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        if name not in answers:
            with Worker(self.folder, find_variant(name), self.case) as worker:
                worker.ask("open", threads=1)
                answers = answers | {name: self._answer(worker)}
        return answers[name]

    def measure(self, batch: int, seconds: float, rng: np.random.Generator) -> dict[str, Timing]:
        """Time one size of batch: short turns of every variant, in an order drawn anew."""
        timings, slices, left = {}, {}, {}
        for name, worker in self.workers.items():
            worker.ask("prepare", batch=batch)
            first = worker.ask("time", calls=1, skip=1)
            timings[name] = Timing([])
            call = first["seconds"][0]
            slices[name] = int(np.clip(_SLICE_SECONDS / call, 1, 2000))
            left[name] = int(np.clip(seconds / (slices[name] * call), 3, _ROUNDS))
        while left:
            for name in rng.permutation(list(left)):
                skip = int(slices[name] > 1 or not timings[name].seconds)
                answer = self.workers[name].ask("time", calls=slices[name], skip=skip)
                timings[name].add(answer)
                left[name] -= 1
                if not left[name]:
                    del left[name]
        return timings


def _share(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], int8: bool) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if int8:
        return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std() / INT8_RMS)
    return float(np.abs(found - expected).max() / (RTOL * np.abs(expected).max()))


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, versions."""
    from importlib.metadata import version

    processor = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    level = next((f for f in ("avx512_bf16", "avx512f", "avx2", "avx") if f in flags), "none")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "vector instructions": level,
        "cores": str(os.cpu_count()),
        "memory": f"{pages / 2**30:.1f} GiB",
        "load when begun": f"{os.getloadavg()[0]:.1f}",
        **{name: version(name) for name in ("torch", "onnxruntime", "fbgemm-gpu", "torchrec")},
    }
