"""Latency and throughput of exported models on a CPU, against the usual ways to serve them.

    python benchmarks/serving_latency.py --rival-python RIVAL/bin/python --json serving.json

DLRM and DCNv2 as in MLPerf's training benchmark: 26 tables of a million rows and 128 columns
(13.3 GB of random numbers, written once below --folder). Variants: our whole-model graphs, ONNX
and pt2, of the flat model and of its towers at compressions 1, 2 and 4; and (a) eager torch, (b)
`torch.onnx.export`, (c) fbgemm's inference kernel and TorchRec's quantised module with the dense
parts in eager torch, (d) the flat model in our own formulation. All map the same file, so its
pages are in memory once; each runs in a process of its own; the processes take turns. Answers are
compared with eager torch's first; a variant that differs is an error. Inputs are made beforehand,
in the shape that the runtime takes, and as many of them that rows are not found in the
processor's cache; what a runtime does with them (ONNX Runtime's feeds, jagged ids into bags) is
timed. `--part lookup` times the pooled embeddings alone.

The weights are locked in memory where the system allows it; a figure during which pages came from
the disk all the same has a `!` behind it.

`--rival-python` is an interpreter with torch, onnx and onnxscript, for `torch.onnx.export`: for
example a virtual environment beside this one. Without it, this one is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serving_case import FORMS, MODELS, Case
from serving_results import Result, judge, show_tables, show_verdicts, summarise
from serving_rounds import Cell, VariantError, build_all, describe_machine, note
from serving_variants import VARIANTS, Variant

_BATCHES = (1, 64, 256, 1024, 4096)


@dataclass(slots=True)
class Findings:
    """What a run found so far."""

    machine: dict[str, str]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    """Case -> variant -> difference from eager torch as a share of its limit."""

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        value = {
            "machine": self.machine,
            "settings": self.settings,
            "differences": self.differences,
            "results": [result.to_json() for result in self.results],
            "aims": judge(self.results),
        }
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    findings = Findings(
        machine=describe_machine(),
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
    )
    print(", ".join(f"{name} {value}" for name, value in findings.machine.items()))
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.keep_freed:
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
    try:
        with prepared_folder(folder, options):
            locked = LockedFiles()
            for case in cases(options):
                run_case(folder, case, options, findings, locked)
    finally:  # an interrupted run shows what it has
        for line in (*show_tables(findings.results), *show_verdicts(judge(findings.results))):
            print(line)
        findings.write(options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of every table")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--batches", nargs="+", type=int, default=_BATCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, help="by default all")
    parser.add_argument("--part", choices=("model", "lookup"), default="model")
    parser.add_argument("--ids", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--seconds", type=float, default=1.0, help="per variant and cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("serving-benchmark"))
    parser.add_argument("--keep", action="store_true", help="keep weights and graphs for next time")
    parser.add_argument(
        "--keep-freed", action="store_true", help="have malloc keep freed memory, in all variants"
    )
    parser.add_argument("--rival-python", default="", help="interpreter for torch.onnx.export")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="few rows, two batches, one thread")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.batches, options.threads = 2000, (1, 64), (1,)
        options.seconds = min(options.seconds, 0.05)
    if options.part == "lookup":
        options.models = ("dlrm",)  # the lookup is the same in all models
    return options


@contextlib.contextmanager
def prepared_folder(folder: Path, options: argparse.Namespace) -> Iterator[None]:
    """Keep what an earlier run left if it fits, and leave nothing unless asked to."""
    stamp = folder / "settings.json"
    settings = {"rows": options.rows, "seed": options.seed}
    if not stamp.is_file() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something else; choose another --folder")
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != settings:
        clear(folder)
        need = 26 * options.rows * 128 * 5
        if shutil.disk_usage(folder).free < need:
            raise SystemExit(f"{folder} needs {need / 2**30:.1f} GiB; choose --folder or --rows")
    try:
        stamp.write_text(json.dumps(settings), encoding="utf-8")
        yield
    finally:
        for part in folder.glob("**/*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if not options.keep:
            clear(folder)
            with contextlib.suppress(OSError):  # somebody put a file there
                folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what this benchmark writes, and nothing else."""
    shutil.rmtree(folder / "graphs", ignore_errors=True)
    for pattern in ("weights.*", "*.log", "answer.npy", "settings.json"):
        for path in folder.glob(pattern):
            path.unlink()


class LockedFiles:
    """Holds files in memory: what pages come from the disk would be timed otherwise.

    Variants share these pages, which a kernel may otherwise write off between two touches.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def add(self, path: Path) -> None:
        if path in self._maps or not path.is_file():
            return
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._maps[path] = mapped
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped))):
            note(f"{path.name} cannot be locked in memory (ulimit -l); watch for pages from disk")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model in options.models:
        for form in options.forms:
            yield Case(
                model=model,
                form=form,
                rows=options.rows,
                ids=options.ids,
                part=options.part,
                seed=options.seed,
            )


def chosen_variants(case: Case, names: list[str] | None) -> list[Variant]:
    return [
        variant
        for variant in VARIANTS
        if case.form in variant.forms
        and case.part in variant.parts
        and (variant.measured if names is None else variant.name in names)
    ]


def run_case(
    folder: Path,
    case: Case,
    options: argparse.Namespace,
    findings: Findings,
    locked: LockedFiles,
) -> None:
    """Build, check and time all variants of one model with one form of input."""
    variants = build_all(
        folder, chosen_variants(case, options.variants), case, options.rival_python
    )
    locked.add(folder / "weights.safetensors")
    if any(variant.int8 for variant in variants):
        locked.add(folder / "weights.int8")
    rng = np.random.default_rng(options.seed)
    with Cell(folder, case, variants) as cell:
        for threads in options.threads:
            cell.open(threads)
            if threads == options.threads[0]:
                findings.differences[f"{case.model} {case.form}"] = cell.check()
            for batch in options.batches:
                timings = cell.measure(batch, options.seconds, rng)
                where = {"model": case.model, "form": case.form, "part": case.part}
                for name, timing in timings.items():
                    findings.results.append(
                        summarise(
                            timing.seconds,
                            timing.major_faults,
                            variant=name,
                            threads=threads,
                            batch=batch,
                            **where,
                        )
                    )
                note(f"{case.model} {case.form}, {threads} thread(s), batch {batch}: done")
                findings.write(options.json)


if __name__ == "__main__":
    try:
        main()
    except VariantError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
