"""What a converted model is worth after a little training, and what starting anew takes instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from flat_models import Flat, FlatJob, open_flat
from quality_at_start import START_NAMES, Fitting, module_name, prepare_fittings
from quality_tables import Record

from dmt_convert.config import TrainingConfig
from dmt_convert.data import open_data
from dmt_convert.model import DmtModel, DmtSpec, FlatModel
from dmt_convert.recipes.train_flat import epoch_batches, make_optimizer, train_step, validate
from dmt_convert.training import TrainResult, load_tables, measure_rows, train

SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "defaults": {},
    "tables alone, row-wise Adagrad 0.002": {"dense_lr": 0.0, "table_lr": 0.002},
    "tables alone, Adam 0.001": {"dense_lr": 0.0, "table_lr": 1e-3, "table_optimizer": "adam"},
}
"""Settings of fine-tuning. All are tried; the best one on the validation rows is kept."""
TENTH: Final = 10
"""The flat model's steps over those of fine-tuning."""
LIMIT: Final = 2
"""Steps of training anew, at most, over the flat model's."""
_EVALUATIONS: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """Converted models of one flat model that are to be trained."""

    flat: FlatJob
    towers: int
    compressions: tuple[float, ...]
    distill_steps: int
    scratch: bool
    """Whether the same architecture is trained anew as well."""


def measure_training(job: TrainingJob) -> list[Record]:
    """Fine-tune for a tenth of the flat model's steps, then train anew until that is reached."""
    return list(_measure(job))


def _measure(job: TrainingJob) -> Iterator[Record]:
    flat = open_flat(job.flat)
    fittings = prepare_fittings(flat)
    keys: Record = {"arch": job.flat.arch, "seed": job.flat.seed}
    yield keys | {"compression": "-", "start": "flat"} | finetune(flat, flat.model)
    for compression in job.compressions:
        specs, reached = {}, {}
        for name, (_, start) in START_NAMES.items():
            model = convert(fittings[name], job, compression)
            specs[name] = model.spec
            reached[start] = finetune(flat, model)
            shape = {"compression": compression, "shape": module_name(model.spec)}
            yield keys | shape | {"start": start} | reached[start]
        if job.scratch:
            targets = {
                (start, after): found[f"valid_{key}"]
                for start, found in reached.items()
                for key, after in (("before", "step 0"), ("after", "a tenth"))
            }
            for found in train_anew(flat, specs["calibrated"], targets):
                yield keys | {"compression": compression} | found


def convert(fitting: Fitting, job: TrainingJob, compression: float) -> DmtModel:
    module = "best" if fitting.flat.job.arch == "dlrm" else "default"
    model = fitting.convert(fitting.partition(job.towers, module), module, compression)
    return fitting.distill(model, job.distill_steps)


def finetune(flat: Flat, model: FlatModel | DmtModel) -> Record:
    """Train for a tenth of the flat model's steps with each setting; the best one counts."""
    job = flat.job
    train_rows, valid, test = (
        open_data(job.data / f"{split}.npz") for split in ("train", "valid", "test")
    )
    infos = {table.name: flat.info.table_info(table.name) for table in flat.info.spec.tables}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    auc = {"before": measure_rows(load_tables(model, infos), test).auc}
    best: TrainResult | None = None
    for name, setting in SETTINGS.items():
        config = TrainingConfig(
            max_steps=round(job.steps / TENTH),
            batch_size=job.config.batch_size,
            patience=None,
            seed=job.seed,
            **setting,
        )
        model.load_state_dict(start)
        tuned = load_tables(model, infos)
        result = train(tuned, train_rows, valid, config)
        if best is None or result.best.score < best.best.score:
            best, chosen = result, name
            auc["after"] = measure_rows(tuned, test).auc
    model.load_state_dict(start)
    assert best is not None and auc["before"] is not None and auc["after"] is not None
    flat_auc = measure_rows(load_tables(flat.model, infos), test).auc
    assert flat_auc is not None
    return {
        "auc": auc["after"],
        "lost_before": flat_auc - auc["before"],
        "lost_after": flat_auc - auc["after"],
        "valid_before": best.start.auc,
        "valid_after": best.best.auc,
        "setting": chosen,
        "best_step": best.best_step,
        "steps": best.steps,
    }


def train_anew(
    flat: Flat, spec: DmtSpec, targets: Mapping[tuple[str, str], float]
) -> Iterator[Record]:
    """Train a model of this architecture as the flat one was trained, tables and all.

    It may take twice the flat model's steps, and ends where all targets are reached on the
    validation rows.
    """
    job = flat.job
    limit, every = LIMIT * job.steps, max(1, job.steps // _EVALUATIONS)
    curve: list[tuple[int, float]] = []
    torch.manual_seed(job.seed)
    model = DmtModel(spec)
    for step in _train_steps(flat, model, limit):
        if step % every == 0 or step == limit:
            auc = validate(model, open_data(job.data / "valid.npz"))
            assert auc is not None
            curve.append((step, auc))
            if auc >= max(targets.values()):
                break
    best_step, best_auc = max(curve, key=lambda point: point[1])
    for (start, after), target in targets.items():
        yield {
            "start": start,
            "after": after,
            "target": target,
            "reached": next((step for step, auc in curve if auc >= target), None),
            "limit": limit,
            "flat_steps": job.steps,
            "best_auc": best_auc,
            "best_step": best_step,
            "curve": curve,
        }


def _train_steps(flat: Flat, model: DmtModel, limit: int) -> Iterator[int]:
    """Take the flat model's steps, pass after pass, and yield their numbers from 1."""
    config, rows = flat.job.config, open_data(flat.job.data / "train.npz")
    optimizer = make_optimizer(model, config)
    step = epoch = 0
    while step < limit:
        for batch in epoch_batches(rows, flat.info.spec, config, epoch):
            train_step(model, optimizer, batch)
            step += 1
            yield step
            if step == limit:
                return
        epoch += 1
