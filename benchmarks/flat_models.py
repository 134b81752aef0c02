"""Flat models that benchmarks convert: trained once per data set, architecture and seed.

    python benchmarks/flat_models.py --data ../shared/data/movielens1m --flat-cache flat --seeds 0 1

The training settings of a data set are listed in `SETTINGS`. A checkpoint that is already in the
cache folder, made with the very same settings, is read instead of being trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion import Sample, draw_sample, pool_batch
from dmt_convert.data import adapt_batches, join_batches, open_data
from dmt_convert.families import FlatModelInfo, infer_model
from dmt_convert.metrics import measure_accuracy, measure_agreement
from dmt_convert.model import FlatModel, open_flat_model
from dmt_convert.recipes.train_flat import TrainConfig, save_flat, train_flat

FloatArray = npt.NDArray[np.float32]

SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "amazon_access": {"epochs": 5, "batch_size": 256},
    "criteo100k": {"epochs": 2},
    "frappe": {"epochs": 8, "batch_size": 1024, "table_decay": 1e-5},
    "movielens100k": {"epochs": 8},
    "movielens1m": {"epochs": 4, "batch_size": 1024, "table_decay": 1e-5},
}
"""Data set -> how its flat models are trained, where that differs from TrainConfig's defaults."""
_BLOCK: Final = 8192
_HELD_OUT: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatJob:
    """One flat model: what to train, and where its checkpoint lies."""

    data: Path
    arch: str
    seed: int
    cache: Path
    dim: int = 16
    """Embedding dim N."""

    @property
    def config(self) -> TrainConfig:
        settings = SETTINGS.get(self.data.name, {})
        return TrainConfig(
            data=self.data,
            arch=self.arch,  # type: ignore[arg-type]
            seed=self.seed,
            embedding_dim=self.dim,
            **settings,
        )

    @property
    def path(self) -> Path:
        settings = json.dumps({k: v for k, v in asdict(self.config).items() if k != "data"})
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        name = f"{self.data.name}_{self.arch}_n{self.dim}_seed{self.seed}_{digest}.pt"
        return self.cache / name

    @property
    def steps(self) -> int:
        """Steps that training takes."""
        rows = open_data(self.data / "train.npz").num_rows
        return self.config.epochs * math.ceil(rows / self.config.batch_size)

    @property
    def name(self) -> str:
        return f"{self.data.name} {self.arch} N = {self.dim} seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Labelled rows of a split, with the flat model's pooled embeddings and logits."""

    dense: FloatArray
    pooled: FloatArray
    labels: FloatArray
    reference: FloatArray

    def compare(self, model: nn.Module) -> dict[str, float]:
        """Measure a model on these rows, alone and against the flat one."""
        logits = _score(model, self.dense, self.pooled)
        before, after = (measure_accuracy(z, self.labels) for z in (self.reference, logits))
        assert before.auc is not None and after.auc is not None and after.ne is not None
        agreement = measure_agreement(self.reference, logits)
        return {
            "auc": after.auc,
            "auc_lost": before.auc - after.auc,
            "ne": after.ne,
            "r2": agreement.r2,
            "rank_correlation": agreement.rank_correlation,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """A flat model, opened."""

    job: FlatJob
    info: FlatModelInfo
    model: FlatModel

    def rows(self, split: str) -> Rows:
        """Read a split and pool its embeddings once."""
        dataset = open_data(self.job.data / f"{split}.npz")
        batch = join_batches(list(adapt_batches(dataset, self.info.spec, dataset.batches(_BLOCK))))
        assert batch.labels is not None
        dense, pooled = np.array(batch.dense), pool_batch(self.info, batch)
        return Rows(
            dense=dense,
            pooled=pooled,
            labels=batch.labels,
            reference=_score(self.model, dense, pooled),
        )

    def samples(self) -> dict[str, Sample]:
        """Draw what `dmt convert` fits on, without and with calibration data (no labels)."""
        seed, valid = self.job.seed, self.job.data / "valid.npz"
        return {
            "no data": draw_sample(self.info, seed=seed),
            "calibrated": draw_sample(self.info, calibration=valid, seed=seed),
        }


def split_rows(sample: Sample) -> tuple[Sample, Sample]:
    """The rows of a sample that `dmt convert` fits on, and those that it judges by."""
    return sample.split(_HELD_OUT)


def train_job(job: FlatJob) -> None:
    """Train a flat model, unless its checkpoint is there."""
    if not job.path.is_file():
        job.cache.mkdir(parents=True, exist_ok=True)
        unfinished = job.path.with_suffix(f".{os.getpid()}.part")
        save_flat(*train_flat(job.config), unfinished)
        unfinished.rename(job.path)


def open_flat(job: FlatJob) -> Flat:
    train_job(job)
    info = infer_model(open_checkpoint(job.path))
    return Flat(job=job, info=info, model=open_flat_model(info))


def _score(model: nn.Module, dense: FloatArray, pooled: FloatArray) -> FloatArray:
    parts = []
    with torch.inference_mode():
        for begin in range(0, len(dense), _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            logits = model.forward_pooled(  # type: ignore[operator]
                torch.from_numpy(dense[rows]), torch.from_numpy(pooled[rows])
            )
            parts.append(logits.numpy())
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--flat-cache", type=Path, required=True, help="where checkpoints lie")
    parser.add_argument("--archs", nargs="+", choices=("dlrm", "dcn"), default=["dlrm", "dcn"])
    parser.add_argument("--dims", type=int, nargs="+", default=[16], help="embedding dims N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = itertools.product(options.seeds, options.dims, options.archs, options.data)
    for seed, dim, arch, data in chosen:
        job = FlatJob(data=data, arch=arch, seed=seed, cache=options.flat_cache, dim=dim)
        begin = time.perf_counter()
        found = open_flat(job).rows("test")
        auc = measure_accuracy(found.reference, found.labels).auc
        seconds = time.perf_counter() - begin
        print(f"{job.name}: test AUC {auc:.4f}, {seconds:.0f} s, {job.path}", flush=True)


if __name__ == "__main__":
    main()
