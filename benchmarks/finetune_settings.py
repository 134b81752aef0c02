"""What fine-tuning gains with several learning rates, with a teacher and without.

    python benchmarks/finetune_settings.py --data data/frappe --flat-cache flat --work work
    python benchmarks/finetune_settings.py --work work --print

converts flat DLRMs (benchmarks/flat_models.py; cached) with the training rows as calibration, and
trains every bundle for a tenth of the flat model's steps with each of `SETTINGS`, by the loop of
`dmt finetune` in this process. What counts is the state that would be written: the best one on
the validation rows, or the start. AUC is of the test rows, which nothing else sees. One JSON line
per training goes to `WORK/settings.jsonl`; a line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from flat_models import FlatJob, open_flat
from frontier import TENTH, Record, Results, flat_keys
from quality_tables import print_rows
from torch import nn

import dmt_convert as dmt
from dmt_convert.bundle import Bundle, is_bundle, open_bundle
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Dataset, open_inputs
from dmt_convert.model.code_modules import Code
from dmt_convert.model.tower_code import FULL_LEVELS, HALF_LEVELS
from dmt_convert.training import (
    Evaluation,
    TrainableModel,
    choose_teacher,
    load_bundle,
    load_tables,
    measure_rows,
    open_teacher,
    open_training_data,
    train,
)

_FULL: Final = {"dense_lr": 5e-4, "table_lr": 0.02}
_TABLES: Final = {"dense_lr": 0.0, "table_lr": 0.002}
_TENTH: Final = {"dense_lr": 5e-5, "table_lr": 0.002}
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "full rates": _FULL,
    "tables alone": _TABLES,
    "a tenth of the rates": _TENTH,
    "a third of the rates": {"dense_lr": 1.7e-4, "table_lr": 0.007},
    "full rates, labels": _FULL | {"teacher_weight": 0.0},
    "full rates, teacher": _FULL | {"teacher_weight": 1.0},
    "tables alone, labels": _TABLES | {"teacher_weight": 0.0},
    "full rates, constant": _FULL | {"lr_decay": "constant"},
}
"""Name -> what differs from the defaults of `dmt finetune`, which takes "tables alone" if the
bundle agrees with the flat model, else "full rates"."""


def measure(
    job: FlatJob, compression: float, part: int, todo: list[str], work: Path
) -> Iterator[Record]:
    """Train a bundle with each of some settings, for one of so many parts of the flat steps."""
    flat, bundle = open_flat(job), convert(job, compression, work)
    test = open_inputs(job.data / "test.npz", bundle.manifest.model.flat, bundle.manifest.inputs)
    data = open_training_data(job.data, None, bundle.manifest)

    def auc(model: TrainableModel) -> float:
        found = measure_rows(model, test).auc
        assert found is not None
        return found

    infos = {table.name: flat.info.table_info(table.name) for table in flat.info.spec.tables}
    best = auc(load_tables(flat.model, infos))
    for name in todo:
        config = TrainingConfig(
            max_steps=round(job.steps / part),
            batch_size=job.config.batch_size,
            seed=job.seed,
            **SETTINGS[name],
        )
        model, lost = load_bundle(bundle), list[float]()
        before = clipped(model, test)
        # what computes the same as the flat model has nothing to learn from it
        choice = choose_teacher(bundle, job.path if compression else "none", config.teacher_weight)
        result = train(
            model,
            data.train,
            data.valid,
            config,
            teacher=open_teacher(choice, bundle),
            on_evaluation=lambda _, model=model, lost=lost: lost.append(best - auc(model)),
        )
        steps = [evaluation.step for evaluation in result.history]
        yield {
            **flat_keys(job),
            "compression": compression,
            "part": part,
            "variant": name,
            "r2": bundle.quality.converted.r2,
            "auc_lost": lost[0],
            "tuned_auc_lost": lost[steps.index(result.best_step)],
            "best_step": result.best_step,
            "lost": lost,
            "clipped": [before, clipped(model, test)],
            "history": [evaluation.to_json() for evaluation in result.history],
        }


def clipped(model: TrainableModel, rows: Dataset) -> float:
    """Share of int8 elements on some rows that lie beyond the static range of their code."""
    beyond, count = 0, 0

    def look(code: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal beyond, count
        assert isinstance(code, Code)
        level = torch.round((inputs[0] - code.low) / code.step)
        top = torch.full((code.width,), FULL_LEVELS - 1)
        top[code.width - code.spec.int4 :] = HALF_LEVELS - 1
        beyond += int(((level < 0) | (level > top)).sum())
        count += level.numel()

    codes = [part for part in model.module.modules() if isinstance(part, Code) and part.packs]
    hooks = [code.register_forward_pre_hook(look) for code in codes]
    measure_rows(model, rows)
    for hook in hooks:
        hook.remove()
    return beyond / max(1, count)


def convert(job: FlatJob, compression: float, work: Path) -> Bundle:
    """Convert a flat model, unless that was done; compression 0 keeps what it computes."""
    out = work / f"{job.path.stem}-{compression:g}"
    if is_bundle(out):
        return open_bundle(out)
    options: dict[str, Any] = {"tower_module": "passthrough"}
    if compression:
        options = {"compression": compression, "calibration": job.data / "train.npz"}
    return dmt.convert(job.path, out, towers=4, seed=job.seed, **options)


def print_results(results: Results, names: Sequence[str]) -> None:
    """Print a row per bundle, a column per setting: AUC lost, and the step that was kept."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record in sorted(results.records, key=lambda each: (each["data"], each["compression"])):
        if record["variant"] not in names:
            continue
        name = f"/ {record['compression']:g}" if record["compression"] else "passthrough"
        if record["part"] != TENTH:
            name += f", 1/{record['part']} of the steps"
        row = rows.setdefault((record["data"], str(record["seed"]), name), {})
        row["R^2"], row["before"] = f"{record['r2']:.4f}", f"{record['auc_lost']:.4f}"
        history = [Evaluation(**each) for each in record["history"]]
        kept = keep(history)
        row[record["variant"]] = (
            f"{record['lost'][kept]:.4f} ({history[kept].step} of {history[-1].step})"
        )
    titles = ["set", "seed", "bundle", "R^2", "before", *names]
    print_rows(titles, [[*key, *(row.get(n, "") for n in titles[3:])] for key, row in rows.items()])


def keep(history: Sequence[Evaluation]) -> int:
    """Return which evaluation's state is written: the best that beats the start, or the start."""
    better = [i for i, found in enumerate(history) if found.beats_start]
    return min(better, key=lambda i: history[i].score, default=0)


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    results = Results(options.work / "settings.jsonl")
    cells = itertools.product(options.seeds, options.data, options.compressions)
    for seed, data, compression in () if options.print else cells:
        job = FlatJob(data=data, arch="dlrm", seed=seed, cache=options.flat_cache)
        known = flat_keys(job) | {"compression": compression, "part": options.part}
        todo = [n for n in options.settings if not results.find(known | {"variant": n})]
        if todo:
            for record in measure(job, compression, options.part, todo, options.work):
                results.add(record)
    print_results(results, options.settings)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of data sets")
    parser.add_argument("--flat-cache", type=Path, help="where flat models lie")
    parser.add_argument("--work", type=Path, required=True, help="where bundles and results go")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--compressions", type=float, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--part", type=int, default=TENTH, help="the flat model's steps over these")
    parser.add_argument("--print", action="store_true", help="only print what was measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
