"""Train a model in one process, its tables in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import nn

from dmt_convert.data import Dataset, adapt_batches
from dmt_convert.metrics import Accuracy, measure_accuracy
from dmt_convert.model import DmtModel, FlatModel
from dmt_convert.training.finetune_config import FinetuneConfig
from dmt_convert.training.loop import (
    Evaluation,
    Schedule,
    TrainingParts,
    TrainResult,
    run_loop,
    take_step,
)
from dmt_convert.training.optimizers import DenseOptimizer, TableOptimizer
from dmt_convert.training.table_store import TableStore
from dmt_convert.training.trainable_model import TrainableModel, make_trainable
from dmt_convert.training.training_data import training_batches

_EVALUATION_ROWS = 4096


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
    config: FinetuneConfig,
    *,
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
        eval_at: Steps to measure after, beside every `config.eval_every`-th.
        stop_at: Ends training when an evaluation is good enough.
        on_step: Told of every step, from 1, and its loss.
        on_evaluation: Told of every evaluation.

    Raises:
        ConfigError: The model's tables are not in memory, or the loss is no longer finite.
        DataError: The data do not fit the model.
    """
    trained = model if isinstance(model, TrainableModel) else make_trainable(model)
    measure_rows(trained, valid_rows, max_rows=1)  # that the data fit is known before training
    num_rows = train_rows.num_rows
    schedule = Schedule(
        total_steps=config.total_steps(num_rows),
        eval_every=config.steps_between_evaluations(num_rows),
        eval_at=frozenset(eval_at),
        stop_at=stop_at,
    )
    parts = _make_parts(trained, train_rows, valid_rows, config)
    try:
        return run_loop(parts, config, schedule, on_step=on_step, on_evaluation=on_evaluation)
    finally:
        trained.store.forget_gradients()
        for parameter in trained.dense_parameters().values():
            parameter.grad = None


def _make_parts(
    model: TrainableModel, train_rows: Dataset, valid_rows: Dataset, config: FinetuneConfig
) -> TrainingParts:
    """What the loop works with where there is one process."""
    parameters = model.dense_parameters()
    batches = training_batches(train_rows, model.spec, config)
    optimizers = (
        DenseOptimizer(parameters.values(), config),
        TableOptimizer(model.store, config),
    )
    return TrainingParts(
        step=lambda lr_factor: take_step(model, optimizers, next(batches), lr_factor),
        measure=lambda: measure_rows(model, valid_rows),
        best_state=BestInMemory(parameters, model.store),
    )


def measure_rows(model: TrainableModel, rows: Dataset, *, max_rows: int | None = None) -> Accuracy:
    """Measure a model on labelled rows.

    Args:
        model: The model.
        rows: Labelled rows.
        max_rows: Measure only so many.

    Returns:
        The measures; log loss NaN and the others None where a logit is not finite.

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
    return measure_accuracy(joined, np.concatenate(labels))
