"""Training and validation rows, and the order in which they come."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.arrays import IntArray
from dmt_convert.bundle import Manifest
from dmt_convert.config import TrainingConfig
from dmt_convert.data import (
    Batch,
    Dataset,
    RowBatches,
    Share,
    adapt_batches,
    adapt_shares,
    deal_batches,
    merge_records,
    open_data,
    open_inputs,
    take_range,
)
from dmt_convert.documents import InputRecord, TrainingDataRecord, to_json
from dmt_convert.errors import DataError
from dmt_convert.spec import ModelSpec

logger = logging.getLogger(__name__)

_LABELS_HINT: Final = (
    "training needs labels; to imitate a flat model without labels, use "
    "`dmt convert --distill-steps`"
)
_HELD_OUT: Final = 0.1
_MAX_HELD_OUT: Final = 100_000
_SEED_STRIDE: Final = 1_000_003
"""Between the first passes of two seeds, so that no two passes have the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Rows to train on, and others to measure on."""

    train: Dataset
    """Training rows."""
    valid: Dataset
    """Validation rows."""
    train_name: str
    """What the training rows are."""
    valid_name: str
    """What the validation rows are."""

    @property
    def has_weights(self) -> bool:
        """Whether ids come with weights."""
        first = next(iter(self.train.batches(1)))
        return any(bag.weights is not None for bag in first.bags)

    @property
    def record(self) -> TrainingDataRecord:
        """What the manifest says of the data."""
        return TrainingDataRecord(
            train=self.train_name,
            train_rows=self.train.num_rows,
            valid=self.valid_name,
            valid_rows=self.valid.num_rows,
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return to_json(self.record)


def open_training_data(
    data: Path, valid: Path | None = None, manifest: Manifest | None = None
) -> TrainingData:
    """Open training and validation rows as the inputs of a bundle's model.

    Args:
        data: A data set, or a folder with `train.npz` and, if `valid` is not given,
            `valid.npz`.
        valid: Validation rows. Without them and without a `valid.npz`, the last tenth of the data
            (at most 100,000 rows) is held out.
        manifest: The bundle's: its model, and the columns that fed it so far. Without it columns
            meet the model's inputs later, and again at every pass.

    Raises:
        DataError: The data cannot be read, does not fit the model, has no labels, or too few
            rows.
    """
    if (data / "train.npz").is_file():
        if valid is None and (data / "valid.npz").is_file():
            valid = data / "valid.npz"
        data = data / "train.npz"
    known = None if manifest is None else manifest.inputs
    rows = _open(data, manifest, known)
    rows.require_labels(_LABELS_HINT)
    if valid is not None:
        measured = _open(valid, manifest, merge_records(known, rows.inputs), said=rows.notes)
        measured.require_labels(_LABELS_HINT)
        return TrainingData(
            train=rows, valid=measured, train_name=data.name, valid_name=_name(valid)
        )
    held = min(int(rows.num_rows * _HELD_OUT), _MAX_HELD_OUT)
    if held < 1:
        raise DataError(
            f"{data} has {rows.num_rows} rows, too few to hold a tenth of them out",
            expected="at least 10 rows",
            hint="give more rows, or validation rows with --valid",
        )
    cut = rows.num_rows - held
    logger.info("no validation rows were given: the last %s rows of %s are held out", held, data)
    return TrainingData(
        train=take_range(rows, 0, cut),
        valid=take_range(rows, cut, rows.num_rows),
        train_name=f"{data.name}, first {cut} rows",
        valid_name=f"{data.name}, last {held} rows",
    )


def _open(
    path: Path,
    manifest: Manifest | None,
    known: InputRecord | None,
    said: Collection[str] = (),
) -> Dataset:
    if manifest is None:
        return open_data(path)
    return open_inputs(path, manifest.model.flat, known, said=said)


def _name(path: Path) -> str:
    return path.name or str(path)


def training_batches(dataset: Dataset, spec: ModelSpec, config: TrainingConfig) -> Iterator[Batch]:
    """Yield batches, pass after pass without end, each pass in an order of its own.

    Args:
        dataset: Training rows.
        spec: The flat model's spec.
        config: Seed, and rows per step.

    Raises:
        DataError: The data do not fit the model (at once), or a row is wrong (as it comes).
    """
    return adapt_batches(dataset, spec, RowBatches(_passes(dataset, config)))


def _passes(dataset: Dataset, config: TrainingConfig) -> Iterator[tuple[Batch, IntArray]]:
    for epoch in itertools.count():
        batches = dataset.batches(config.batch_size, shuffle_seed=_seed(config, epoch))
        assert isinstance(batches, RowBatches)
        for batch in batches:
            yield batch, batches.rows


def training_shares(
    dataset: Dataset,
    spec: ModelSpec,
    config: TrainingConfig,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
) -> Iterator[Share]:
    """Yield one rank's rows of the batches of `training_batches`.

    Args:
        dataset: Training rows.
        spec: The flat model's spec.
        config: Seed, and rows per step over all ranks.
        rank: This rank.
        world_size: Number of ranks.
        start_step: Batches to skip (to resume).

    Raises:
        DataError: The data do not fit the model (at once), or a row is wrong (as it comes).
    """
    per_pass = math.ceil(dataset.num_rows / config.batch_size)

    def shares() -> Iterator[Share]:
        for epoch in itertools.count(start_step // per_pass):
            yield from deal_batches(
                dataset,
                config.batch_size,
                rank=rank,
                world_size=world_size,
                shuffle_seed=_seed(config, epoch),
                start_batch=max(0, start_step - epoch * per_pass),
            )

    return adapt_shares(dataset, spec, shares())


def _seed(config: TrainingConfig, epoch: int) -> int:
    return config.seed * _SEED_STRIDE + epoch
