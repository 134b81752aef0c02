"""What conversion keeps of a flat model: before fine-tuning, after it, and against starting anew.

    python benchmarks/conversion_quality.py --data ../shared/data/criteo100k --json out.json

trains flat models (DLRM with dot interaction, DLRM-DCNv2; `--flat-cache` keeps them), converts
each to several numbers of towers and compressions, and prints tables: mean over the seeds, in
brackets the largest minus the smallest.

- start: every start before any fine-tuning, on the test rows. `closed form` uses no data;
  `calibrated` the validation rows, without their labels; `shared projection` is the baseline (one
  projection for all vectors, no data); `random` draws the tower modules and every layer whose
  inputs change. Module `default` emits a vector per feature; for dot, `c0` emits p vectors
  per tower instead, and `best` is whichever of these `dmt convert --compression` alone chooses.
- finetune: distilled starts (first of --towers, compression 2 and 4), trained for a tenth of the
  steps that the flat model took. Some settings are tried; the best one, and the best state, are
  chosen on the validation rows (NE). The flat model is trained further as a yardstick.
- scratch: the same architecture trained from nothing, exactly as the flat model was: steps until
  it is as good on the validation rows as the converted one at step 0 and after that tenth. It ends
  there. Towers and dims are those of the calibrated model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from flat_models import FlatJob, train_job
from quality_after_training import SETTINGS, TrainingJob, measure_training
from quality_at_start import StartJob, measure_start
from quality_tables import (
    Record,
    describe_machine,
    describe_training,
    group,
    mean_spread,
    print_rows,
    print_table,
    show,
    write_json,
)
from worker_pool import run_jobs

PARTS = ("start", "finetune", "scratch")
FINETUNE_COMPRESSIONS = (2.0, 4.0)
MODULE_TITLES = {
    "default": "a vector per feature",
    "c0": "p vectors per tower alone (c = 0)",
    "best": "the module that `--compression` alone chooses",
}
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
    add("--modules", nargs="+", choices=tuple(MODULE_TITLES), default=list(MODULE_TITLES))
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
        jobs = [start_job(flat, options) for flat in flats]
        found = run_jobs(measure_start, jobs, options.workers, "start")
        results["start"] = [record for records in found for record in records]
        print_start(results["start"])
        write_json(options.json, settings, results)
    if {"finetune", "scratch"} & set(options.parts):
        training = [training_job(flat, options) for flat in flats]
        found = run_jobs(measure_training, training, options.workers, "training")
        records = [record for records in found for record in records]
        results["finetune"] = [r for r in records if "lost_after" in r]
        results["scratch"] = [r for r in records if "target" in r]
        print_finetune(results["finetune"], training[0])
        print_scratch(results["scratch"])
        write_json(options.json, settings, results)
    print(f"\n{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


def start_job(flat: FlatJob, options: argparse.Namespace) -> StartJob:
    return StartJob(
        flat=flat,
        towers=tuple(options.towers),
        compressions=tuple(options.compressions),
        modules=tuple(options.modules),
        distill_steps=options.distill_steps,
    )


def training_job(flat: FlatJob, options: argparse.Namespace) -> TrainingJob:
    return TrainingJob(
        flat=flat,
        towers=options.towers[0],
        compressions=tuple(c for c in options.compressions if c in FINETUNE_COMPRESSIONS),
        distill_steps=options.distill_steps,
        scratch="scratch" in options.parts,
    )


def describe_settings(options: argparse.Namespace, flat: FlatJob) -> list[str]:
    return [
        f"data: {options.data.name}; seeds 0 to {options.seeds - 1}; distillation of "
        f"{options.distill_steps} steps; {flat.steps} steps of flat training",
        describe_training(flat.config),
        "towers beyond the number of features are left out",
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


def print_finetune(records: list[Record], job: TrainingJob) -> None:
    tenth = f"{records[0]['steps']} steps, a tenth of the flat model's"
    print(f"\nAfter fine-tuning for {tenth}; {job.towers} towers\n")
    print("settings tried, chosen on the validation rows:", "; ".join(SETTINGS))
    print()
    rows = []
    for keys, own in group(records, ["arch", "compression", "start"]).items():
        cells = [mean_spread([r[f] for r in own]) for f in ("lost_before", "lost_after", "auc")]
        chosen = [f"{len(same)} x {name}" for (name,), same in group(own, ["setting"]).items()]
        best = ", ".join(str(r["best_step"]) for r in own)
        rows.append([*map(show, keys), *cells, "; ".join(chosen), best])
    titles = ["model", "compression", "start", "AUC lost before", "AUC lost after", "AUC after"]
    print_rows([*titles, "setting chosen", "best step"], rows)


def print_scratch(records: list[Record]) -> None:
    if not records:
        return
    limit, flat_steps = records[0]["limit"], records[0]["flat_steps"]
    print(
        f"\nThe same architecture trained from nothing, at most {limit} steps (the flat model took "
        f"{flat_steps}): steps to the converted model's validation AUC\n"
    )
    rows = []
    for keys, own in group(records, ["arch", "compression", "start", "after"]).items():
        steps = [r["reached"] for r in own if r["reached"] is not None]
        text = f"{mean_spread(steps, 0)}" if steps else ""
        if len(steps) < len(own):
            missed = f"not reached in {limit}: {len(own) - len(steps)} of {len(own)} seeds"
            text = f"{text}; {missed}" if text else missed
        figures = [mean_spread([r[f] for r in own]) for f in ("target", "best_auc")]
        rows.append([*map(show, keys), figures[0], text, figures[1]])
    titles = ["model", "compression", "start", "after", "validation AUC", "steps from nothing"]
    print_rows([*titles, "best from nothing until then"], rows)


if __name__ == "__main__":
    main()
