"""The loop: batches through a model, one optimizer per part, measured now and then.

Nothing here knows how many processes there are or where tables live: the model, the optimizers,
the batches, the measurement and the best state come from whoever holds them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmt_convert.data import Batch
from dmt_convert.errors import ConfigError
from dmt_convert.finetune.finetune_config import FinetuneConfig
from dmt_convert.finetune.optimizers import PartOptimizer
from dmt_convert.scoring import Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How good the model was on the validation rows after a step."""

    step: int
    """Steps taken; 0 is the start."""
    auc: float | None
    """Area under the ROC curve; None where only one class occurs."""
    ne: float | None
    """Normalised entropy; None where only one class occurs."""
    log_loss: float
    """Mean negative log likelihood, in nats."""
    train_loss: float | None
    """Mean loss of the steps since the evaluation before, in nats; None at the start."""

    @property
    def score(self) -> float:
        """What decides, lower is better: NE, or the log loss where there is none."""
        return self.log_loss if self.ne is None else self.ne

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of training; the model is in its best state."""

    history: tuple[Evaluation, ...]
    """All evaluations; the first is of the start."""
    best: Evaluation
    """The one whose state the model has; the start's, where nothing beat it."""
    steps: int
    """Steps taken."""
    seconds: float
    """Time spent on training steps, data included, evaluations not."""

    @property
    def start(self) -> Evaluation:
        """The evaluation before the first step."""
        return self.history[0]

    @property
    def ms_per_step(self) -> float:
        """Milliseconds per step."""
        return 1e3 * self.seconds / max(1, self.steps)

    @property
    def best_step(self) -> int:
        """Steps after which the model was best."""
        return self.best.step

    @property
    def improved(self) -> bool:
        """Whether anything beat the start."""
        return self.best.step > 0


class BestState(Protocol):
    """Holds on to the best state of a model while it is trained on."""

    def keep(self) -> None:
        """Take the present state for the best."""

    def restore(self) -> None:
        """Bring the best state back."""


@dataclass(slots=True, kw_only=True)
class EarlyStopping:
    """Which evaluation is the best, and whether to go on."""

    patience: int | None
    """Evaluations without improvement after which to stop; None for never."""
    best: Evaluation | None = None
    """The best so far."""
    _waited: int = field(default=0)

    def update(self, evaluation: Evaluation) -> bool:
        """Take an evaluation; returns whether it is the best so far."""
        if self.best is None or evaluation.score < self.best.score:
            self.best, self._waited = evaluation, 0
            return True
        self._waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience is at an end."""
        return self.patience is not None and self._waited >= self.patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When to measure, and when to end."""

    total_steps: int
    """Steps to take at most."""
    eval_every: int
    """Steps between evaluations; the last step is always followed by one."""
    eval_at: frozenset[int] = frozenset()
    """Further steps that are followed by an evaluation."""
    stop_at: Callable[[Evaluation], bool] = lambda evaluation: False
    """Ends training when an evaluation is good enough."""

    def measures(self, step: int) -> bool:
        """Whether a step, from 1, is followed by an evaluation."""
        return step % self.eval_every == 0 or step in self.eval_at or step == self.total_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParts:
    """What the loop works with; another engine brings its own."""

    model: Callable[[Batch], Tensor]
    """Gives logits, shape (B,)."""
    optimizers: Sequence[PartOptimizer]
    """One per part of the model."""
    batches: Iterator[Batch]
    """Labelled batches, without end."""
    measure: Callable[[], Accuracy]
    """Measures the model on the validation rows."""
    best_state: BestState
    """Holds on to the best state."""


def run_loop(
    parts: TrainingParts,
    config: FinetuneConfig,
    schedule: Schedule,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> TrainResult:
    """Train until the last step, or until evaluations no longer get better.

    The start is a candidate: afterwards the model is never worse on the validation rows than it
    was before.

    Args:
        parts: Model, optimizers, batches, measurement, best state.
        config: Learning rates over time, patience.
        schedule: When to measure, when to end.
        on_step: Told of every step, from 1, and its loss.
        on_evaluation: Told of every evaluation.

    Raises:
        ConfigError: The loss is no longer finite.
        DataError: A row is not what the format promises.
    """
    stopping = EarlyStopping(patience=config.patience)
    history = [_evaluate(parts, stopping, 0, [])]
    on_evaluation(history[0])
    step, seconds, losses, total = 0, 0.0, list[float](), schedule.total_steps
    begin = time.perf_counter()
    while step < total and not stopping.is_over and not schedule.stop_at(history[-1]):
        step += 1
        batch = next(parts.batches)
        loss = take_step(parts.model, parts.optimizers, batch, config.lr_factor(step, total))
        if not math.isfinite(loss):
            raise _diverged("loss", loss, step)
        losses.append(loss)
        on_step(step, loss)
        if schedule.measures(step):
            seconds += time.perf_counter() - begin
            history.append(_evaluate(parts, stopping, step, losses))
            on_evaluation(history[-1])
            losses.clear()
            begin = time.perf_counter()
    parts.best_state.restore()
    assert stopping.best is not None
    return TrainResult(history=tuple(history), best=stopping.best, steps=step, seconds=seconds)


def _evaluate(
    parts: TrainingParts, stopping: EarlyStopping, step: int, losses: Sequence[float]
) -> Evaluation:
    """Measure, and keep the state where it is the best so far."""
    accuracy = parts.measure()
    if not math.isfinite(accuracy.log_loss):
        raise _diverged("validation loss", accuracy.log_loss, step)
    evaluation = Evaluation(
        step=step,
        auc=accuracy.auc,
        ne=accuracy.ne,
        log_loss=accuracy.log_loss,
        train_loss=sum(losses) / len(losses) if losses else None,
    )
    if stopping.update(evaluation):
        parts.best_state.keep()
    return evaluation


def take_step(
    model: Callable[[Batch], Tensor],
    optimizers: Sequence[PartOptimizer],
    batch: Batch,
    lr_factor: float = 1.0,
) -> float:
    """Take one step on one batch.

    Args:
        model: Gives logits, shape (B,).
        optimizers: One per part of the model.
        batch: Labelled rows.
        lr_factor: What learning rates are multiplied by.

    Returns:
        Mean binary cross entropy before the step, in nats. Where it is not finite, no weight
        was changed.
    """
    assert batch.labels is not None
    labels = torch.from_numpy(np.require(batch.labels, requirements=["C", "W"]))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = nn.functional.binary_cross_entropy_with_logits(model(batch), labels)
    value = float(loss.detach())
    if math.isfinite(value):
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step(lr_factor)
    return value


def _diverged(what: str, value: float, step: int) -> ConfigError:
    return ConfigError(
        f"training diverged: the {what} is {value} at step {step}",
        expected="a finite loss; nothing was written",
        hint="lower --dense-lr and --table-lr, add --warmup-steps 100 or --clip-norm 1",
    )
