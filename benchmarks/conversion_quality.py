"""What conversion keeps of a flat model: before fine-tuning, after it, and against starting anew.

    python benchmarks/conversion_quality.py --data ../shared/data/criteo100k --json out.json

trains flat models (DLRM with dot interaction, DLRM-DCNv2; `--flat-cache` keeps them), converts
each to several numbers of towers and compressions, and prints tables: mean over the seeds, in
brackets the largest minus the smallest.

- start: every start before any fine-tuning, on the test rows. `closed form` uses no data;
  `calibrated` the validation rows, without their labels; `shared projection` is the baseline (one
  projection for all vectors, no data); `random` draws the tower modules and every layer whose
  inputs change. Module `default` is what `dmt convert --compression` chooses; `c0`, for dot, emits
  p vectors per tower and none per feature.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from flat_models import FlatJob, train_job
from quality_at_start import StartJob, measure_start
from quality_tables import (
    Record,
    describe_machine,
    describe_training,
    group,
    print_table,
    write_json,
)
from worker_pool import run_jobs

PARTS = ("start",)
MODULE_TITLES = {"default": "default module", "c0": "p vectors per tower alone (c = 0)"}
TITLES_OF_KEYS = {"towers": "towers", "compression": "compression", "start": "start"}


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        cache = options.flat_cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        run(options, cache)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.npz, valid.npz, test.npz")
    add("--archs", nargs="+", choices=("dlrm", "dcn"), default=["dlrm", "dcn"])
    add("--seeds", type=int, default=3)
    add("--towers", type=int, nargs="+", default=[4, 8, 16])
    add("--compressions", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    add("--modules", nargs="+", choices=("default", "c0"), default=["default", "c0"])
    add("--distill-steps", type=int, default=500, help="0 leaves distillation out")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--flat-cache", type=Path, help="folder that keeps the flat models' checkpoints")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    add("--json", type=Path, help="write every single outcome to this file")
    return parser.parse_args()


def run(options: argparse.Namespace, cache: Path) -> None:
    flats = [
        FlatJob(data=options.data, arch=arch, seed=seed, cache=cache)
        for arch in options.archs
        for seed in range(options.seeds)
    ]
    begin = time.perf_counter()
    settings = describe_settings(options, flats[0])
    print("\n".join(settings), flush=True)
    run_jobs(train_job, flats, options.workers, "flat models")
    results: dict[str, list[Record]] = {}
    if "start" in options.parts:
        jobs = [
            StartJob(
                flat=flat,
                towers=tuple(options.towers),
                compressions=tuple(options.compressions),
                modules=tuple(options.modules),
                distill_steps=options.distill_steps,
            )
            for flat in flats
        ]
        found = run_jobs(measure_start, jobs, options.workers, "start")
        results["start"] = [record for records in found for record in records]
        print_start(results["start"])
        write_json(options.json, settings, results)
    print(f"\n{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


def describe_settings(options: argparse.Namespace, flat: FlatJob) -> list[str]:
    return [
        f"data: {options.data.name}; seeds 0 to {options.seeds - 1}; distillation of "
        f"{options.distill_steps} steps; {flat.steps} steps of flat training",
        describe_training(flat.config),
        describe_machine(options.workers),
    ]


def print_start(records: list[Record]) -> None:
    """Print one table per architecture and kind of module."""
    for (arch,), of_arch in group(records, ["arch"]).items():
        for (module,), of_module in group(of_arch, ["module"]).items():
            if module not in MODULE_TITLES:
                continue
            yardsticks = [r for r in of_arch if r["module"] not in MODULE_TITLES]
            print(f"\n{arch}, {MODULE_TITLES[module]}, before any fine-tuning\n")
            print_table([*yardsticks, *of_module], TITLES_OF_KEYS)
            print()
            for (towers, compression), same in group(of_module, ["towers", "compression"]).items():
                shapes = " or ".join(dict.fromkeys(record["shape"] for record in same))
                print(f"{towers} towers, compression {compression:g}: {shapes}")


if __name__ == "__main__":
    main()
