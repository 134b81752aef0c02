"""Train in one process: a model's tables into memory, if they fit, and the loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, stream_tensor, to_fp32
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Dataset, adapt_batches
from dmt_convert.errors import ConfigError
from dmt_convert.free_memory import available_bytes, gib
from dmt_convert.metrics import Accuracy, measure_accuracy
from dmt_convert.model import DmtModel, FlatModel
from dmt_convert.spec import ModelSpec
from dmt_convert.training.absurd_weights import name_absurd
from dmt_convert.training.data import training_batches
from dmt_convert.training.loop import (
    Evaluation,
    Schedule,
    TrainingParts,
    TrainResult,
    loss_blocks,
    run_loop,
    take_step,
)
from dmt_convert.training.optimizers import DenseOptimizer, TableOptimizer, state_bytes
from dmt_convert.training.tables import TableStore
from dmt_convert.training.teacher import Teacher
from dmt_convert.training.trainable_model import TrainableModel, make_trainable

_EVALUATION_ROWS: Final = 4096
_SCRATCH_BYTES: Final = 5
"""Per row: a slot and a flag of the store."""


def load_bundle(
    bundle: Bundle, on_bytes: Callable[[int], None] = lambda count: None
) -> TrainableModel:
    """Read a bundle into memory; fp16 and bf16 tables become fp32.

    If the bundle holds accumulators of squared gradients, Adagrad will go on from them.

    Args:
        bundle: The bundle.
        on_bytes: Called with the size of every piece that was read.

    Raises:
        BundleError: The bundle is not what its manifest says.
    """
    module, infos = open_bundle_model(bundle), table_infos(bundle)
    return load_tables(module, infos, on_bytes, accumulators=bundle.accumulators)


def load_tables(
    module: DmtModel | FlatModel,
    infos: Mapping[str, TensorInfo],
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    accumulators: Mapping[str, TensorInfo] | None = None,
) -> TrainableModel:
    """Read tables into memory, for a model that looks them up on disk.

    Args:
        module: The model. It keeps its lookups, and shares its other weights with the result.
        infos: Table -> its tensor in a file; fp16 and bf16 become fp32.
        on_bytes: Called with the size of every piece that was read.
        accumulators: Table -> its accumulator in a file, shape (rows, 1). Adagrad goes on from
            it, and reads it when training begins.
    """
    spec = module.spec.flat if isinstance(module, DmtModel) else module.spec
    store = TableStore(spec, accumulators)
    for name, info in infos.items():
        target = store.table(name).view(-1)
        done = 0
        for chunk in stream_tensor(info):
            values = np.array(to_fp32(chunk.reshape(1, -1), info.dtype)).reshape(-1)
            target[done : done + len(values)] = torch.from_numpy(values)
            done += len(values)
            on_bytes(chunk.nbytes)
        assert done == len(target), (name, done, len(target))
    return TrainableModel(module=module, store=store)


def table_infos(bundle: Bundle) -> dict[str, TensorInfo]:
    """Table -> its tensor in the bundle's files."""
    return {
        name.removeprefix("tables.").removesuffix(".weight"): info
        for tensors in bundle.towers
        for name, info in tensors.items()
        if name.startswith("tables.")
    }


def needed_bytes(spec: ModelSpec, config: TrainingConfig, num_rows: int) -> dict[str, int]:
    """Estimate what training keeps in memory, by purpose.

    Args:
        spec: The flat model's spec.
        config: What training is asked for.
        num_rows: Training rows.

    Returns:
        tables; optimizer state; best rows: what a row held in the best state, for rows that
        changed since (at most one per id trained on, taking one id per feature and row), with
        Adagrad's sums.
    """
    rows = sum(table.rows for table in spec.tables)
    elements = sum(table.rows * table.dim for table in spec.tables)
    looked_up = config.total_steps(num_rows) * config.batch_size
    changed = 0
    for table in spec.tables:
        features = sum(feature.table == table.name for feature in spec.features)
        touched = min(table.rows, features * looked_up)
        changed += touched * table.dim * 4
        if config.table_optimizer in ("rowwise-adagrad", "adagrad"):
            changed += state_bytes(config, touched, touched * table.dim)
    return {
        "tables": elements * 4 + rows * _SCRATCH_BYTES,
        "optimizer state": state_bytes(config, rows, elements),
        "best rows": changed if config.table_lr > 0 else 0,
    }


def check_memory(spec: ModelSpec, config: TrainingConfig, num_rows: int) -> None:
    """Refuse a model whose tables and their optimizer state do not fit into memory.

    Args:
        spec: The flat model's spec.
        config: What training is asked for.
        num_rows: Training rows.

    Raises:
        ConfigError: They do not.
    """
    needed, available = needed_bytes(spec, config, num_rows), available_bytes()
    total = sum(needed.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {gib(size)}" for name, size in needed.items())
    raise ConfigError(
        f"training needs {gib(total)} of memory ({parts})",
        expected=f"at most the {gib(available)} that are free",
        hint="use --table-optimizer sgd or rowwise-adagrad, which keep the least, or a machine "
        "with more memory",
    )


class BestInMemory:
    """The best state of a model in memory: dense parts copied, tables by journal.

    Args:
        parameters: Everything but tables.
        store: The tables.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], store: TableStore) -> None:
        self._parameters, self._store = parameters, store
        self._kept: dict[str, torch.Tensor] = {}

    def keep(self) -> None:
        """Take the present state for the best."""
        self._kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._store.keep()

    def restore(self) -> None:
        """Bring the best state back."""
        for name, value in self._kept.items():
            self._parameters[name].data.copy_(value)
        self._store.restore()


def train(
    model: DmtModel | FlatModel | TrainableModel,
    train_rows: Dataset,
    valid_rows: Dataset,
    config: TrainingConfig,
    *,
    teacher: Teacher | None = None,
    eval_at: Collection[int] = (),
    stop_at: Callable[[Evaluation], bool] = lambda evaluation: False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> TrainResult:
    """Train a model in place; afterwards it is in the state that was best on the validation rows.

    Args:
        model: A model whose tables are in memory, converted or flat, trained before or not.
        train_rows: Labelled rows to train on.
        valid_rows: Labelled rows to measure on.
        config: Settings.
        teacher: What teaches beside the labels; None: nothing does.
        eval_at: Steps to measure after, beside every `config.eval_every`-th.
        stop_at: Ends training when an evaluation is good enough.
        on_step: Called after every step, from 1, with its loss.
        on_evaluation: Called after every evaluation.

    Raises:
        ConfigError: The model's tables are not in memory, or the loss is no longer finite.
        DataError: The data do not fit the model.
    """
    trained = model if isinstance(model, TrainableModel) else make_trainable(model)
    measure_rows(trained, valid_rows, max_rows=1)  # refuses data that do not fit, before training
    schedule = replace(
        Schedule.of(config, train_rows.num_rows), eval_at=frozenset(eval_at), stop_at=stop_at
    )
    parts = _make_parts(trained, train_rows, valid_rows, config, teacher)
    try:
        return run_loop(parts, config, schedule, on_step=on_step, on_evaluation=on_evaluation)
    finally:
        trained.store.forget_gradients()
        for parameter in trained.dense_parameters().values():
            parameter.grad = None


def _make_parts(
    model: TrainableModel,
    train_rows: Dataset,
    valid_rows: Dataset,
    config: TrainingConfig,
    teacher: Teacher | None,
) -> TrainingParts:
    """Build what the loop works with."""
    parameters = model.dense_parameters()
    batches = training_batches(train_rows, model.spec, config)
    if teacher is not None:
        batches = map(teacher.mix, batches)
    optimizers = (
        DenseOptimizer(parameters.values(), config),
        TableOptimizer(model.store, config),
    )
    return TrainingParts(
        step=lambda lr_factor: take_step(model, optimizers, next(batches), lr_factor),
        measure=lambda: measure_rows(model, valid_rows),
        best_state=BestInMemory(parameters, model.store),
        causes=lambda: name_absurd_weights(model),
    )


def name_absurd_weights(model: TrainableModel) -> list[str]:
    """Say which tables and parameters hold absurd weights, a line each."""
    tables = (
        (f"table {table.name!r}", model.store.table(table.name)) for table in model.spec.tables
    )
    return [*name_absurd(tables), *name_absurd(model.dense_parameters().items())]


def measure_rows(model: TrainableModel, rows: Dataset, *, max_rows: int | None = None) -> Accuracy:
    """Measure a model on labelled rows.

    Args:
        model: The model.
        rows: Labelled rows.
        max_rows: Measure at most this number of rows.

    Returns:
        The measures; log loss NaN and the others None if a logit is not finite.

    Raises:
        DataError: The data do not fit the model.
    """
    logits, labels = [], []
    with torch.no_grad():
        batches = rows.batches(_EVALUATION_ROWS, max_rows=max_rows)
        for batch in adapt_batches(rows, model.spec, batches):
            assert batch.labels is not None
            logits.append(model(batch).numpy())
            labels.append(batch.labels)
    joined = np.concatenate(logits)
    if not np.isfinite(joined).all():
        return Accuracy(auc=None, log_loss=math.nan, ne=None)
    blocks = loss_blocks(np.arange(len(joined)))
    return measure_accuracy(joined, np.concatenate(labels), blocks=blocks)
