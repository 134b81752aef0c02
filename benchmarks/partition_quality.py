"""Which way of forming towers keeps most of a model at the same compression.

    python benchmarks/partition_quality.py --data DATA/movielens1m DATA/criteo100k

- planted: flat models trained on generated clicks with planted groups of features; the share of
  pairs inside towers that were planted together, from the checkpoint alone and with calibration.
- loss: what a conversion loses, by strategy, before and after distillation. The tower modules mix
  features: dcn for DCNv2, and for DLRM p vectors per tower alone (c = 0). With a vector per feature
  (c = 1) dot products do not care which tower computes them.
- affinity: the correlation of the off-diagonal affinity between training seeds.

Figures are means over seeds, in brackets the largest minus the smallest. Random partitions are as
balanced as all others; their mean, best and worst are taken within every seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from flat_models import FlatJob, open_flat, train_job
from partition_strategies import (
    RANDOM,
    list_partitions,
    measure_affinities,
    off_diagonal,
    read_groups,
    share_together,
)
from quality_at_start import module_name, prepare_fittings
from quality_tables import (
    Record,
    describe_machine,
    describe_training,
    group,
    mean_spread,
    print_rows,
    write_json,
)
from worker_pool import run_jobs

from dmt_convert.config import AFFINITY_KINDS
from dmt_convert.recipes.generate_clicks import ClickConfig, generate_clicks

PARTS = ("planted", "loss", "affinity")
NOISE: Final[Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "across 1.5": {"strength_across": 1.5},
    "correlation 0.1": {"correlation": 0.1},
    "noise 3": {"noise": 3.0},
    "rank 4": {"rank": 4},
    "hard": {"strength_across": 1.5, "correlation": 0.1, "noise": 3.0},
}
"""Generated clicks -> what differs from the defaults of generate_clicks."""
LOSSES: Final = {
    "closed_1-r2": "1 - R^2, closed form",
    "distilled_1-r2": "1 - R^2, distilled",
    "closed_auc_lost": "AUC lost, closed form",
    "distilled_auc_lost": "AUC lost, distilled",
}
"""Figure -> column title."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionJob:
    """One flat model, and what its partitions are asked for."""

    flat: FlatJob
    affinities: tuple[str, ...]
    towers: int
    randoms: int
    compression: float
    distill_steps: int
    losses: bool
    clicks: ClickConfig | None = None
    """How the data are generated; None: they are there."""
    setting: str = ""
    """What the generated data are called in tables."""


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cache = options.flat_cache or scratch
        cache.mkdir(parents=True, exist_ok=True)
        run(options, cache, scratch)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--data", type=Path, nargs="*", default=[], help="folders with train.npz, ... to convert on"
    )
    add("--archs", nargs="+", choices=("dlrm", "dcn"), default=["dlrm", "dcn"])
    add("--seeds", type=int, default=3)
    add("--towers", type=int, default=4)
    add("--compression", type=float, default=4.0)
    add("--affinities", nargs="+", default=list(AFFINITY_KINDS))
    add("--randoms", type=int, default=8, help="random partitions")
    add("--distill-steps", type=int, default=300)
    add("--noise", nargs="+", choices=tuple(NOISE), default=list(NOISE), help="generated clicks")
    add("--rows", type=int, default=100_000, help="rows of generated clicks")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--flat-cache", type=Path, help="folder that keeps the flat models' checkpoints")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    add("--json", type=Path, help="write every single outcome to this file")
    return parser.parse_args()


def run(options: argparse.Namespace, cache: Path, scratch: Path) -> None:
    begin = time.perf_counter()
    settings = [
        f"{options.seeds} seeds, {options.towers} towers, {options.randoms} random partitions; "
        f"compression {options.compression:g}, distillation of {options.distill_steps} steps",
        describe_machine(options.workers),
    ]
    print("\n".join(settings), flush=True)
    results: dict[str, list[Record]] = {}

    def measure(part: str, jobs: Sequence[PartitionJob], show: Callable[..., None]) -> None:
        print(f"\n{jobs[0].flat.data.name}: {describe_training(jobs[0].flat.config)}")
        found = run_jobs(measure_partitions, jobs, options.workers, jobs[0].flat.data.name)
        records = [record for records in found for record in records]
        results.setdefault(part, []).extend(records)
        show(records)
        write_json(options.json, settings, results)

    if "planted" in options.parts:
        measure("planted", planted_jobs(options, scratch), print_planted)
    if {"loss", "affinity"} & set(options.parts):
        for data in options.data:
            jobs = data_jobs(options, data, cache)
            run_jobs(train_job, [job.flat for job in jobs], options.workers, "flat models")
            measure(data.name, jobs, lambda found: print_data(found, options.parts))
    print(f"\n{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


def make_job(options: argparse.Namespace, flat: FlatJob, *, losses: bool) -> PartitionJob:
    return PartitionJob(
        flat=flat,
        affinities=tuple(options.affinities),
        towers=options.towers,
        randoms=options.randoms,
        compression=options.compression,
        distill_steps=options.distill_steps,
        losses=losses,
    )


def data_jobs(options: argparse.Namespace, data: Path, cache: Path) -> list[PartitionJob]:
    return [
        make_job(
            options,
            FlatJob(data=data, arch=arch, seed=seed, cache=cache),
            losses="loss" in options.parts,
        )
        for arch in options.archs
        for seed in range(options.seeds)
    ]


def planted_jobs(options: argparse.Namespace, scratch: Path) -> list[PartitionJob]:
    """Every seed has data of its own; checkpoints of generated data are not kept."""
    jobs = []
    for arch, (number, setting) in itertools.product(options.archs, enumerate(options.noise)):
        for seed in range(options.seeds):
            folder = scratch / f"{arch}-{number}-{seed}" / "clicks"
            job = make_job(
                options,
                FlatJob(data=folder, arch=arch, seed=seed, cache=folder.parent),
                losses=False,
            )
            clicks = ClickConfig(
                rows=options.rows, groups=options.towers, seed=seed, **NOISE[setting]
            )
            jobs.append(replace(job, clicks=clicks, setting=setting))
    return jobs


def measure_partitions(job: PartitionJob) -> list[Record]:
    """Form towers in every way, and measure them."""
    if job.clicks is not None:
        generate_clicks(job.clicks, job.flat.data)
    return list(_measure(job))


def _measure(job: PartitionJob) -> Iterator[Record]:
    flat = open_flat(job.flat)
    groups = read_groups(job.flat.data)
    test = flat.rows("test")
    flat_auc = test.compare(flat.model)["auc"]
    module = "c0" if flat.info.spec.interaction.kind == "dot" else "default"
    for name, fitting in prepare_fittings(flat).items():
        keys: Record = {
            "arch": job.flat.arch,
            "seed": job.flat.seed,
            "setting": job.setting,
            "sample": name,
        }
        affinities = measure_affinities(flat.info, fitting.sample, job.affinities)
        for kind, affinity in affinities.items():
            yield keys | {"affinity": kind, "pairs": off_diagonal(affinity).tolist()}
        natural = groups if job.clicks is None else ()
        partitions = list_partitions(
            flat.info, affinities, job.towers, randoms=job.randoms, natural=natural
        )
        for strategy, towers in partitions.items():
            record = keys | {"strategy": strategy, "towers": towers}
            if job.clicks is not None:
                record["together"] = share_together(towers, groups)
                record["flat_auc"] = flat_auc
            if job.losses:
                model = fitting.convert(towers, module, job.compression)
                record["shape"] = module_name(model.spec)
                for stage in ("closed", "distilled"):
                    if stage == "distilled":
                        model = fitting.distill(model, job.distill_steps)
                    found = test.compare(model)
                    record[f"{stage}_1-r2"] = 1 - found["r2"]
                    record[f"{stage}_auc_lost"] = found["auc_lost"]
            yield record


def by_strategy(records: Sequence[Record], figure: str) -> dict[str, list[float]]:
    """Strategy -> its figure per seed; random partitions become their mean, best and worst.

    The best is the smallest where little is lost, the largest where pairs were kept.
    """
    found: dict[str, list[float]] = {}
    best, worst = (np.max, np.min) if figure == "together" else (np.min, np.max)
    for (_,), of_seed in group(records, ["seed"]).items():
        drawn = []
        for record in of_seed:
            if record["strategy"].startswith(RANDOM):
                drawn.append(record[figure])
            else:
                found.setdefault(record["strategy"], []).append(record[figure])
        for name, take in (("mean", np.mean), ("best", best), ("worst", worst)) if drawn else ():
            found.setdefault(f"{RANDOM}, {name} of {len(drawn)}", []).append(float(take(drawn)))
    return found


def print_planted(records: Sequence[Record]) -> None:
    """One table per architecture and sample: strategies against noise."""
    formed = [r for r in records if "strategy" in r]
    for (arch, sample), own in group(formed, ["arch", "sample"]).items():
        print(f"\n{arch}, {sample}: share of pairs inside towers that were planted together\n")
        columns = group(own, ["setting"])
        auc = [mean_spread([r["flat_auc"] for r in column], 3) for column in columns.values()]
        figures = [by_strategy(column, "together") for column in columns.values()]
        rows = [
            [strategy, *(mean_spread(column[strategy], 2) for column in figures)]
            for strategy in figures[0]
        ]
        print_rows(
            ["strategy", *(setting for (setting,) in columns)],
            [["(test AUC of the flat model)", *auc], *rows],
        )


def print_data(records: Sequence[Record], parts: Sequence[str]) -> None:
    formed = [r for r in records if "strategy" in r]
    for (arch, sample), own in group(formed, ["arch", "sample"]).items() if "loss" in parts else ():
        print(f"\n{arch}, {sample}: what conversion loses\n")
        columns = [by_strategy(own, figure) for figure in LOSSES]
        rows = [
            [strategy, *(mean_spread(column[strategy]) for column in columns)]
            for strategy in columns[0]
        ]
        print_rows(["strategy", *LOSSES.values()], rows)
        print("\nmodules:", "; ".join(sorted({record["shape"] for record in own})))
    if "affinity" in parts:
        print("\nCorrelation of the affinities of all pairs of features between training seeds\n")
        rows = []
        measured = [r for r in records if "affinity" in r]
        for keys, own in group(measured, ["arch", "sample", "affinity"]).items():
            pairs = itertools.combinations([r["pairs"] for r in own], 2)
            rows.append([*keys, mean_spread([float(np.corrcoef(a, b)[0, 1]) for a, b in pairs], 2)])
        print_rows(["model", "sample", "affinity", "correlation"], rows)


if __name__ == "__main__":
    main()
