"""Metrics as training goes: one JSON object per line, and TensorBoard's event files beside it.

```
LOG/
  metrics.jsonl            {"step": 100, "time": 1767225600.0, "loss": 0.52, "rows_per_s": 81000.0}
  tensorboard/events...    where the package `tensorboard` is installed
```

The first rank of a training writes; the others have a log without a folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from dmt_convert.errors import DmtError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS: Final = "metrics.jsonl"
"""File of metrics, one JSON object per line."""
TENSORBOARD: Final = "tensorboard"
"""Folder for TensorBoard: `tensorboard --logdir LOG/tensorboard`."""
_FLUSH_SECONDS: Final = 10
"""How much of TensorBoard's events a killed training may lose; of the JSON lines, nothing."""


class TrainingLog:
    """What a training measures, on the disk as soon as it is measured.

    Args:
        folder: Where to; made where it is missing. None writes nothing, for all ranks but one.
        resumed_step: The step of the checkpoint that training goes on from: what was logged of
            later steps goes, as they are done again. None: a new training, an old log goes.
        tensorboard: Whether TensorBoard's files are written; only where it is installed.

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
    """Yield where each line ends, and what it holds, up to the first that is none of ours."""
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
