"""Does the partition by loss beat the other strategies, and random towers of the same size?

    python benchmarks/partition_loss.py --data data/frappe --flat-cache flat --results results

Prints, for the flat DLRM of every data set and every compression, what linear codes in each
partition lose to first order (the part of the logits' variance that the partitioner minimises,
measured on the calibration rows), and what the converted bundle loses on the test rows. Of
`--random` random partitions into towers of equal size, the mean and the best are shown; the best
one by loss is converted, too. Calibrated with the training rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from flat_models import FlatJob, open_flat
from frontier import Bench, Cell, Record, Results, flat_keys
from quality_tables import print_rows

from dmt_convert.config import ConvertConfig
from dmt_convert.conversion import draw_sample, find_towers
from dmt_convert.conversion.felt import measure_felt
from dmt_convert.conversion.module_choice import choose_modules, planned_elements
from dmt_convert.conversion.partition import JointCodes

TOWERS: Final = 4
STRATEGIES: Final = ("loss", "coherent", "diverse", "round-robin")
Towers = Sequence[Sequence[str]]


def random_towers(names: Sequence[str], seed: int) -> list[list[str]]:
    """Deal features at random into towers of equal size, but for one feature."""
    shuffled = [str(name) for name in np.random.default_rng(seed).permutation(names)]
    return [shuffled[t::TOWERS] for t in range(TOWERS)]


def measure(bench: Bench, compression: float, count: int, folder: Path) -> list[Record]:
    """Measure every strategy and random partitions at one compression."""
    job, info = bench.flat.job, bench.flat.info
    data = job.data / "train.npz"
    config = ConvertConfig(towers=TOWERS, compression=compression, calibration=data, seed=job.seed)
    sample = draw_sample(info, calibration=data, seed=job.seed)
    modules = choose_modules(info, config, TOWERS)
    codes = JointCodes(
        measure_felt(info, sample), planned_elements(info.spec, modules, TOWERS, compression)
    )
    names = info.spec.feature_names

    def lost(towers: Towers) -> float:
        return codes.lost([codes.solve([names.index(n) for n in tower]) for tower in towers])

    found: dict[str, Towers] = {
        name: find_towers(info, sample, config.replace(partition=name), modules).towers
        for name in STRATEGIES
    }
    dealt = [random_towers(names, seed) for seed in range(count)]
    losses = [lost(towers) for towers in dealt]
    found[f"best of {count} random"] = dealt[int(np.argmin(losses))]
    records = []
    for name, towers in found.items():
        file = folder / "towers.json"
        file.write_text(json.dumps({"towers": [list(tower) for tower in towers]}))
        cell = Cell(towers=TOWERS, compression=compression, sample="calibrated", variant="default")
        with tempfile.TemporaryDirectory() as out:
            measured = Bench(
                flat=bench.flat, rows=bench.rows, extra={"partition": file}, finetune=False
            ).measure(cell, Path(out))
        records.append(measured | {"variant": name, "lost": lost(towers)})
    mean = flat_keys(job) | {"compression": compression, "variant": f"mean of {count} random"}
    return [*records, mean | {"lost": float(np.mean(losses))}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--flat-cache", type=Path, required=True, help="where flat models lie")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON lines")
    parser.add_argument("--compressions", type=float, nargs="+", default=[16, 32])
    parser.add_argument("--random", type=int, default=20, help="random partitions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.results / "partition_loss.jsonl")
    for data, compression in itertools.product(options.data, options.compressions):
        job = FlatJob(data=data, arch="dlrm", seed=0, cache=options.flat_cache)
        if results.find(flat_keys(job) | {"compression": compression}):
            continue
        flat = open_flat(job)
        bench = Bench(flat=flat, rows=flat.rows("test"), extra={}, finetune=False)
        with tempfile.TemporaryDirectory() as folder:
            for record in measure(bench, compression, options.random, Path(folder)):
                results.add(record)
    print_rows(
        ["set", "bytes", "partition", "lost by linear codes", "test AUC lost", "R^2"],
        [
            [
                record["data"],
                f"/ {record['compression']:g}",
                record["variant"],
                f"{record['lost']:.6f}",
                f"{record['auc_lost']:.5f}" if "auc_lost" in record else "",
                f"{record['r2']:.4f}" if "r2" in record else "",
            ]
            for record in results.records
        ],
    )


if __name__ == "__main__":
    main()
