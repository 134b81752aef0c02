"""The loop in one process, and what every loop keeps: evaluations, progress, a schedule.

Nothing here knows where tables live: the step, the measurement and the best state come from
whoever holds them. The loop over ranks is `recipes/finetune_dmt.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmt_convert.arrays import IntArray
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Batch
from dmt_convert.documents import EvaluationRecord
from dmt_convert.errors import ConfigError, DataError
from dmt_convert.metrics import Accuracy, compare_losses
from dmt_convert.training.absurd_weights import join_causes
from dmt_convert.training.optimizers import PartOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How good the model was on the validation rows after a step."""

    step: int
    """Steps taken; 0 is the start."""
    auc: float | None
    """Area under the ROC curve; None if only one class occurs."""
    ne: float | None
    """Normalised entropy; None if only one class occurs."""
    log_loss: float
    """Mean negative log likelihood, in nats."""
    train_loss: float | None
    """Mean loss of the steps since the evaluation before, in nats; None at the start."""
    gain: float | None = None
    """The start's log loss less this one, in nats; None at the start."""
    gain_error: float | None = None
    """Standard error of `gain`; None where losses were not measured by blocks of rows."""

    @property
    def beats_start(self) -> bool:
        """Whether the gain over the start is more than noise, with 95 % confidence."""
        return self.gain is not None and self.gain > _CONFIDENCE_95 * (self.gain_error or 0.0)

    @property
    def score(self) -> float:
        """What decides, lower is better: NE, or the log loss if it is None."""
        return self.log_loss if self.ne is None else self.ne

    @property
    def record(self) -> EvaluationRecord:
        """What the manifest says of it."""
        return EvaluationRecord(**asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The outcome of training; the model is in its best state."""

    history: tuple[Evaluation, ...]
    """All evaluations; the first is of the start."""
    best: Evaluation
    """The one whose state the model has; the start's, if nothing beat it."""
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
        """Remember the present state as the best."""

    def restore(self) -> None:
        """Return to the best state."""


Causes = Callable[[], Iterable[str]]
"""Names what may be behind a loss that is not finite, or absurd; a line each."""
LOSS_BLOCKS: Final = 200
"""Blocks of validation rows by which losses are compared: enough for a standard error that is
right to a twentieth, few enough to be saved with every checkpoint."""
_CONFIDENCE_95: Final = 1.645
"""Standard errors above zero that a gain has to be, of a one-sided test."""
_ABSURD_LOSS: Final = 1e6
"""Mean loss, in nats, that no model has whose weights and inputs make sense."""
_NOT_SAVED: Final = ("averaged", "best_is_lost")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far training is: all that the loop remembers from step to step."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Time spent on them."""
    losses: list[float] = field(default_factory=list)
    """Losses since the evaluation before, in nats: means over all processes, then this one's."""
    averaged: int = 0
    """How many of `losses`, from the first, are means over all processes."""
    history: list[Evaluation] = field(default_factory=list)
    """All evaluations so far."""
    best_index: int = 0
    """Which of them is the best."""
    start_losses: list[float] = field(default_factory=list)
    """The start's mean losses on blocks of the validation rows, in nats; empty if unknown."""
    best_is_lost: bool = False
    """Whether the best state is gone: the present one has to be measured before training goes on.
    """

    @property
    def best(self) -> Evaluation:
        """The best evaluation so far; of equal ones, the first."""
        return self.history[self.best_index]

    @property
    def mean_loss(self) -> float | None:
        """Mean of the losses since the evaluation before; None if there was no step."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def note_loss(self, loss: float, causes: Causes = lambda: (), step: int | None = None) -> None:
        """Take the loss of a step.

        Args:
            loss: The loss.
            causes: Names weights that are absurd, if the loss is.
            step: The step, if it is not the last one.

        Raises:
            ConfigError: It is not finite.
        """
        if not math.isfinite(loss):
            raise _diverged("loss", loss, self.step if step is None else step, causes())
        self.losses.append(loss)

    def note_accuracy(
        self, accuracy: Accuracy, train_loss: float | None, causes: Causes = lambda: ()
    ) -> bool:
        """Take a measurement; returns whether the model is the best so far, as it is at the start.

        A later state has to beat the start by 1.645 standard errors of what it gains: validation
        rows are few, and of many evaluations one is lucky.

        Args:
            accuracy: On the validation rows.
            train_loss: Mean loss of the steps since the evaluation before, over all processes.
            causes: Names weights that are absurd, if the validation loss is; on all ranks at once.

        Raises:
            ConfigError: The validation loss is not finite, or absurd.
            DataError: All validation rows have one label.
        """
        if not abs(accuracy.log_loss) <= _ABSURD_LOSS:  # NaN, too
            raise _diverged("validation loss", accuracy.log_loss, self.step, causes())
        if accuracy.ne is None:
            raise DataError(
                "all validation rows have the same label: neither AUC nor NE can be measured",
                expected="validation rows with labels 0 and 1",
                hint="give other rows with --valid; without --valid the last tenth of DATA is "
                "held out, so shuffle rows that are sorted by their label",
            )
        gain, error = self._compare_with_start(accuracy)
        evaluation = Evaluation(
            step=self.step,
            auc=accuracy.auc,
            ne=accuracy.ne,
            log_loss=accuracy.log_loss,
            train_loss=train_loss,
            gain=gain,
            gain_error=error,
        )
        self.losses.clear()
        self.averaged, self.best_is_lost = 0, False
        self.history.append(evaluation)
        is_best = len(self.history) == 1 or (
            evaluation.beats_start and evaluation.score < self.best.score
        )
        if is_best:
            self.best_index = len(self.history) - 1
        return is_best

    def _compare_with_start(self, accuracy: Accuracy) -> tuple[float | None, float | None]:
        """How much lower the loss is than the start's, and the standard error of that."""
        if not self.history:
            self.start_losses = list(accuracy.losses)
            return None, None
        if len(self.start_losses) != len(accuracy.losses) or not self.start_losses:
            return self.history[0].log_loss - accuracy.log_loss, None
        _, error = compare_losses(self.start_losses, accuracy.losses)
        return self.history[0].log_loss - accuracy.log_loss, error if error < math.inf else None

    def forget_best(self) -> None:
        """Take the start for the best so far: the best state is gone."""
        self.best_index, self.best_is_lost = 0, True

    def result(self) -> TrainResult:
        """Return what came of training."""
        return TrainResult(
            history=tuple(self.history), best=self.best, steps=self.step, seconds=self.seconds
        )

    def is_over(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row brought no improvement; None: never."""
        return patience is not None and len(self.history) - 1 - self.best_index >= patience

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back. All losses have to be averaged."""
        value = asdict(self)
        return {name: kept for name, kept in value.items() if name not in _NOT_SAVED}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """Read what `to_json` wrote."""
        history = [Evaluation(**evaluation) for evaluation in value["history"]]
        losses = list(value["losses"])
        return cls(**{**value, "history": history, "losses": losses, "averaged": len(losses)})


def loss_blocks(rows: IntArray) -> IntArray:
    """Return the block of every validation row, by its number in the data set."""
    return rows % LOSS_BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When to measure, when to save, and when to end."""

    total_steps: int
    """Steps to take at most."""
    eval_every: int
    """Steps between evaluations; the last step is always followed by one."""
    save_every: int | None = None
    """Steps between checkpoints, beside those of the best states; None for only those."""
    eval_at: frozenset[int] = frozenset()
    """Further steps that are followed by an evaluation."""
    stop_at: Callable[[Evaluation], bool] = lambda evaluation: False
    """Ends training when an evaluation is good enough."""

    @classmethod
    def of(cls, config: TrainingConfig, num_rows: int) -> Schedule:
        """Make the schedule that a config asks for.

        Args:
            config: Steps, evaluations, checkpoints.
            num_rows: Training rows.
        """
        return cls(
            total_steps=config.total_steps(num_rows),
            eval_every=config.steps_between_evaluations(num_rows),
            save_every=config.checkpoint_every,
        )

    def measures(self, step: int) -> bool:
        """Whether a step, from 1, is followed by an evaluation."""
        return step % self.eval_every == 0 or step in self.eval_at or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Whether a step, from 1, is followed by a checkpoint, whatever it is worth."""
        return step == self.total_steps or (
            self.save_every is not None and step % self.save_every == 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParts:
    """What the loop works with."""

    step: Callable[[float], float]
    """Takes a step on the next batch, given what learning rates are multiplied by; returns the
    loss before it."""
    measure: Callable[[], Accuracy]
    """Measures the model on the validation rows."""
    best_state: BestState
    """Holds on to the best state."""
    causes: Causes = lambda: ()
    """Names weights that are absurd."""


def run_loop(
    parts: TrainingParts,
    config: TrainingConfig,
    schedule: Schedule,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
) -> TrainResult:
    """Train until the last step, or until evaluations no longer get better.

    The start is a candidate: afterwards the model is never worse on the validation rows than it
    was before.

    Args:
        parts: Step, measurement, best state.
        config: Learning rates over time, patience.
        schedule: When to measure, and when to end.
        on_step: Called after every step, from 1, with its loss.
        on_evaluation: Called after every evaluation.

    Raises:
        ConfigError: The loss is no longer finite.
        DataError: A row is not what the format promises.
    """
    now, total = Progress(), schedule.total_steps

    def evaluate() -> None:
        if now.note_accuracy(parts.measure(), now.mean_loss, parts.causes):
            parts.best_state.keep()
        on_evaluation(now.history[-1])

    evaluate()
    while (
        now.step < total
        and not now.is_over(config.patience)
        and not schedule.stop_at(now.history[-1])
    ):
        begin = time.perf_counter()
        now.step += 1
        loss = parts.step(config.lr_factor(now.step, total))
        now.note_loss(loss, parts.causes)
        now.seconds += time.perf_counter() - begin
        on_step(now.step, loss)
        if schedule.measures(now.step):
            evaluate()
    parts.best_state.restore()
    return now.result()


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
        Mean binary cross entropy before the step, in nats. If it is not finite, no weight was
        changed.
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


def _diverged(what: str, value: float, step: int, causes: Iterable[str]) -> ConfigError:
    if step == 0:
        return ConfigError(
            f"the {what} is {value:.4g} before the first step",
            expected="a model that fits these rows; nothing was written",
            hint="compare the rows' dense inputs with those of the flat training, and look at the "
            "weights that are named, if any: the bundle, or its checkpoint, may be damaged",
            details=join_causes(causes),
        )
    return ConfigError(
        f"training diverged: the {what} is {value:.4g} at step {step}",
        expected="a finite loss; nothing was written",
        hint="lower --dense-lr and --table-lr, add --warmup-steps 100 or --clip-norm 1",
        details=join_causes(causes),
    )
