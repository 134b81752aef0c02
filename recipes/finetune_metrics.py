"""What the recipe logs as training goes: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmt_convert.training import FinetuneConfig

if TYPE_CHECKING:
    from dmt_convert.training import Evaluation, TrainingLog

_EVERY: Final = 10
"""Steps between lines about steps."""


class MetricsLog:
    """Losses, learning rates, speed and evaluations, by step.

    Args:
        folder: Where to; None logs nothing.
        config: Settings; learning rates follow from the step.
        total: Steps in all.
    """

    def __init__(self, folder: Path | None, config: FinetuneConfig, total: int) -> None:
        self._folder, self._config, self._total = folder, config, total
        self._log: TrainingLog | None = None
        self._last = (0.0, 0)

    def start(self, step: int = 0) -> None:
        """Open the log; what it holds of later steps goes.

        Args:
            step: Where training starts; above 0 where it goes on from a checkpoint.
        """
        from dmt_convert.training import TrainingLog

        self._log = TrainingLog(self._folder, resumed_step=step or None)
        self._last = (time.perf_counter(), step)

    def note_step(self, step: int, loss: float) -> None:
        """Take a step; some are logged, with the first process's loss."""
        if self._log is None or (step % _EVERY and step != self._total):
            return
        now, (then, before) = time.perf_counter(), self._last
        factor = self._config.lr_factor(step, self._total)
        values = {
            "train/loss": loss,
            "train/rows_per_s": (step - before) * self._config.batch_size / max(1e-9, now - then),
            "lr/dense": self._config.dense_lr * factor,
            "lr/tables": self._config.table_lr * factor,
        }
        self._log.write(step, values)
        self._last = (now, step)

    def note_evaluation(self, found: Evaluation) -> None:
        """Take an evaluation; the time that it took is nobody's."""
        if self._log is None:
            return
        values = {
            "valid/auc": found.auc,
            "valid/ne": found.ne,
            "valid/log_loss": found.log_loss,
            "train/mean_loss": found.train_loss,
        }
        self._log.write(found.step, values)
        self._last = (time.perf_counter(), found.step)

    def close(self) -> None:
        """Finish the files."""
        if self._log is not None:
            self._log.close()
