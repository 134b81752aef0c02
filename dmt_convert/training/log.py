"""What is shown and logged as training goes: lines, a bar, and metrics on the disk.

```
LOG/
  metrics.jsonl            {"step": 100, "time": 1767225600.0, "loss": 0.52, "rows_per_s": 81000.0}
  tensorboard/events...    if the package `tensorboard` is installed
```

The first rank of a training writes; the others have a log without a folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from dmt_convert.config import TrainingConfig
from dmt_convert.errors import DmtError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

    from dmt_convert.training.data import TrainingData
    from dmt_convert.training.finetuned import Finetuned
    from dmt_convert.training.loop import Evaluation, TrainResult

logger = logging.getLogger(__name__)

METRICS: Final = "metrics.jsonl"
"""File of metrics, one JSON object per line."""
TENSORBOARD: Final = "tensorboard"
"""Folder for TensorBoard: `tensorboard --logdir LOG/tensorboard`."""
_STEPS_PER_LINE: Final = 10
"""Steps between metrics of steps."""
_FLUSH_SECONDS: Final = 10
"""How much of TensorBoard's events a killed training may lose; of the JSON lines, nothing."""


class TrainingLog:
    """What a training measures, on the disk as soon as it is measured.

    Args:
        folder: Folder to write to; it is made. None writes nothing: for all ranks but one.
        resumed_step: The step of the checkpoint that training goes on from: what was logged of
            later steps is removed, as they are done again. None: a new training; an old log is
            removed.
        tensorboard: Whether TensorBoard's files are written; only if it is installed.

    Raises:
        DmtError: The folder cannot be written to.
    """

    def __init__(
        self, folder: Path | None, *, resumed_step: int | None = None, tensorboard: bool = True
    ) -> None:
        self._folder = folder
        self._lines: FileIO | None = None
        self._events: SummaryWriter | None = None
        if folder is None:
            return
        with _refused(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = _open_lines(folder / METRICS, resumed_step)
            if tensorboard:
                self._events = _open_events(folder / TENSORBOARD, resumed_step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write what was measured after a step.

        Args:
            step: Training steps done.
            values: Name -> number; what is None, NaN or Inf is null in the JSON and missing in
                TensorBoard. Names with a slash are grouped there.

        Raises:
            DmtError: The disk is full, or fails.
        """
        if self._lines is None or self._folder is None:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        now = time.time()
        line = json.dumps({"step": step, "time": now, **finite}, allow_nan=False)
        with _refused(self._folder):
            _write_all(self._lines, f"{line}\n".encode())
        if self._events is not None:
            for name, value in finite.items():
                if value is not None:
                    self._events.add_scalar(name, value, step, walltime=now)

    def close(self) -> None:
        """Finish the files."""
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        self._lines = self._events = None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Monitor:
    """Shows how training goes: lines for people, a bar on a terminal, metrics on the disk.

    Args:
        config: Settings; learning rates follow from the step.
        data: What is trained on.
        say: Prints a line; None: nothing is shown.
        log: Folder for metrics; None: none are logged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: TrainingData,
        *,
        say: Callable[[str], object] | None = None,
        log: Path | None = None,
    ) -> None:
        self._config, self._data, self._folder = config, data, log
        self._total = config.total_steps(data.train.num_rows)
        self.say = say or (lambda line: None)
        self._log: TrainingLog | None = None
        self._bar = _make_bar(self._total) if say and sys.stderr.isatty() else None
        self._last = (0.0, 0)

    def __enter__(self) -> Monitor:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()

    def start(self, step: int = 0) -> None:
        """Say what is trained on; open the log, and remove what it holds of later steps.

        Args:
            step: Where training starts; above 0 if it goes on from a checkpoint.
        """
        data = self._data
        self.say(
            f"{data.train.num_rows:,} rows to train on ({data.train_name}), "
            f"{data.valid.num_rows:,} to measure on ({data.valid_name}); at most {self._total:,} "
            f"steps of {self._config.batch_size} rows"
        )
        if step:
            self.say(f"going on from the checkpoint of step {step:,}")
        self._log = TrainingLog(self._folder, resumed_step=step or None)
        self._last = (time.perf_counter(), step)

    def on_step(self, step: int, loss: float) -> None:
        """Show a step; every tenth is logged, with this process's loss."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, loss=loss)
        if self._log is None or (step % _STEPS_PER_LINE and step != self._total):
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

    def on_evaluation(self, found: Evaluation) -> None:
        """Show an evaluation; the time that it took is left out of rows per second."""
        loss = "" if found.train_loss is None else f"; training loss {found.train_loss:.5f}"
        if found.gain is not None and found.gain_error is not None:
            loss = f" ({-found.gain:+.5f} +- {found.gain_error:.5f}){loss}"
        self.say(
            f"step {found.step:>6}: AUC {_show(found.auc)}, NE {_show(found.ne)}, log loss "
            f"{found.log_loss:.5f}{loss}"
        )
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

    def finish(self, result: TrainResult, written: Finetuned) -> None:
        """Show what came of training, and what was written."""
        before, after = written.before, written.after
        for note in written.notes:
            self.say(f"note: {note}")
        self.say(
            f"{result.steps:,} steps at {result.ms_per_step:.1f} ms, best after {after.step:,}: "
            f"validation AUC {_show(before.auc)} -> {_show(after.auc)}, NE {_show(before.ne)} -> "
            f"{_show(after.ne)}"
        )
        self.say(f"wrote {written.bundle.path}")


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _make_bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("Fine-tuning"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # lines meant for a pipe go there
    )
    bar.add_task("steps", total=total, loss=0.0)
    return bar


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a training; a last line that is not whole is left out.

    Raises:
        DmtError: There are none, or they cannot be read.
    """
    with _refused(folder):
        data = (folder / METRICS).read_bytes()
    return [record for _, record in _records(data)]


def _open_lines(path: Path, resumed_step: int | None) -> FileIO:
    """Open the file behind the last line that stays; every write is one system call."""
    data = path.read_bytes() if path.exists() and resumed_step is not None else b""
    end = 0
    for stop, record in _records(data):
        if resumed_step is None or record["step"] > resumed_step:
            break
        end = stop
    file = path.open("ab", buffering=0)
    os.truncate(file.fileno(), end)
    return file


def _write_all(file: FileIO, data: bytes) -> None:
    """Write all of it; on a full disk a first part may be taken before it is refused."""
    while data:
        data = data[file.write(data) :]


def _records(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield where each line ends, and what it holds, up to the first that another program wrote."""
    end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
            return
        yield end, record


def _open_events(folder: Path, resumed_step: int | None) -> SummaryWriter | None:
    if find_spec("tensorboard") is None:
        logger.info(
            "no TensorBoard files are written: pip install tensorboard; %s has all metrics", METRICS
        )
        return None
    from torch.utils.tensorboard import SummaryWriter

    if resumed_step is None:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    purge = None if resumed_step is None else resumed_step + 1
    return SummaryWriter(str(folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DmtError(
            f"the training log in {folder} cannot be written or read ({error.strerror or error})",
            expected="a folder that can be written to, and room for a line per measurement",
            hint="free space, or give another folder",
        ) from None
