"""AUC and NE before and after conversion, without fine-tuning, on a labelled data set.

    python benchmarks/conversion_quality.py --data ../shared/data/criteo100k --seeds 3

Trains flat models (DLRM with dot interaction, DLRM-DCNv2), converts each to several numbers of
towers and compressions, and prints one table per architecture: mean and spread (largest minus
smallest) over the seeds. `closed form` uses no data; `calibrated` the validation rows, without
their labels; `random` draws the tower modules and every layer whose inputs change.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmt_convert.architectures import FlatModelInfo, infer_model
from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.convert import partition_sample
from dmt_convert.data import Batch, adapt_batches, join_batches, open_data
from dmt_convert.partition import PartitionConfig
from dmt_convert.recipes.train_flat import TrainConfig, save_flat, train_flat
from dmt_convert.sampling import draw_sample
from dmt_convert.scoring import measure_accuracy, measure_agreement
from dmt_convert.scoring.quality import logits_of
from dmt_convert.towers import DmtSpec, FlatModel, TowerSpec, module_spec, open_flat_model
from dmt_convert.towers.initialisation import initialise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    arch: str
    towers: int
    module: str
    start: str
    seed: int
    auc: float
    ne: float
    auc_lost: float
    r2: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--towers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--compressions", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--archs", nargs="+", default=["dlrm", "dcn"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every single outcome to this file")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    for arch in options.archs:
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                flat_path = Path(folder) / "flat.pt"
                config = TrainConfig(
                    data=options.data,
                    arch=arch,
                    epochs=options.epochs,
                    seed=seed,
                    learning_rate=1e-3,
                )
                save_flat(*train_flat(config), flat_path)
                outcomes += measure_seed(arch, seed, flat_path, options)
        print_table(arch, [o for o in outcomes if o.arch == arch])
    if options.json:
        rows = [{f: getattr(o, f) for f in Outcome.__slots__} for o in outcomes]
        options.json.write_text(json.dumps(rows, indent=1))


def measure_seed(arch: str, seed: int, path: Path, options: argparse.Namespace) -> list[Outcome]:
    info = infer_model(open_checkpoint(path))
    flat = open_flat_model(info)
    test = read_all(info, options.data / "test.npz")
    drawn = draw_sample(info, seed=seed)
    calibration = draw_sample(info, calibration=options.data / "valid.npz", seed=seed)
    reference = logits_of(flat, test)
    outcomes = [outcome(arch, 0, "flat", "-", seed, test, reference, reference)]
    for towers in options.towers:
        partition = partition_sample(info, drawn, PartitionConfig(num_towers=towers))
        assignment = partition.assignment.towers
        exact = make_spec(flat, assignment, "passthrough", None)
        model, _ = initialise(flat, exact, None, method="exact")
        logits = logits_of(model, test)
        outcomes.append(
            outcome(arch, towers, "passthrough", "exact", seed, test, reference, logits)
        )
        for compression in options.compressions:
            spec = make_spec(flat, assignment, "auto", compression)
            for start, method, sample in (
                ("closed form", "closed-form", drawn),
                ("calibrated", "closed-form", calibration),
                ("random", "random", None),
            ):
                model, _ = initialise(flat, spec, sample, method=method, seed=seed)  # type: ignore[arg-type]
                name = f"compression {compression:g}"
                logits = logits_of(model, test)
                outcomes.append(outcome(arch, towers, name, start, seed, test, reference, logits))
    return outcomes


def read_all(info: FlatModelInfo, path: Path) -> Batch:
    dataset = open_data(path)
    return join_batches(list(adapt_batches(dataset, info.spec, dataset.batches(8192))))


def make_spec(
    flat: FlatModel, towers: tuple[tuple[str, ...], ...], kind: str, compression: float | None
) -> DmtSpec:
    module = module_spec(
        flat.spec,
        kind,
        num_towers=len(towers),
        compression=compression,  # type: ignore[arg-type]
    )
    specs = tuple(TowerSpec(features=features, module=module) for features in towers)
    return DmtSpec(flat=flat.spec, towers=specs)


def outcome(
    arch: str,
    towers: int,
    module: str,
    start: str,
    seed: int,
    test: Batch,
    reference: np.ndarray,
    logits: np.ndarray,
) -> Outcome:
    assert test.labels is not None
    before, after = (measure_accuracy(x, test.labels) for x in (reference, logits))
    assert before.auc is not None and after.auc is not None and after.ne is not None
    return Outcome(
        arch=arch,
        towers=towers,
        module=module,
        start=start,
        seed=seed,
        auc=after.auc,
        ne=after.ne,
        auc_lost=before.auc - after.auc,
        r2=measure_agreement(reference, logits).r2,
    )


def print_table(arch: str, outcomes: list[Outcome]) -> None:
    seeds = len({o.seed for o in outcomes})
    print(f"\n{arch}, {seeds} seeds: mean (largest - smallest)\n")
    print("| towers | module | start | AUC | AUC lost | NE | R^2 of logits |")
    print("|---:|---|---|---|---|---|---|")
    keys = dict.fromkeys((o.towers, o.module, o.start) for o in outcomes)
    for key in keys:
        rows = [o for o in outcomes if (o.towers, o.module, o.start) == key]
        cells = [
            f"{np.mean(v):.5f} ({np.ptp(v):.5f})"
            for v in (
                [o.auc for o in rows],
                [o.auc_lost for o in rows],
                [o.ne for o in rows],
                [o.r2 for o in rows],
            )
        ]
        print(f"| {key[0] or '-'} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
