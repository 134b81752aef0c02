"""Whether ranks that torchrun starts again belong to a training that had begun.

torchrun starts all ranks again after any of them failed, also after a refusal. Checkpoints are gone
on from, and a bundle is replaced, without the user saying so, only where this launch itself made
them. So the first rank leaves the launch's name in the folder of checkpoints, once nothing stands
in the way of training.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from dmt_convert.cluster.saved_checkpoint import refuse_os_errors

_MARK: Final = ".launch"


def is_continuing(folder: Path) -> bool:
    """Whether this launch had begun to train before its ranks were started again.

    Args:
        folder: Of the checkpoints; perhaps not there.

    Raises:
        CheckpointError: It cannot be read.
    """
    mark = folder / _MARK
    with refuse_os_errors(folder, "read"):
        return mark.is_file() and mark.read_text(encoding="utf-8") == _launch_name()


def mark_begun(folder: Path) -> None:
    """Note that this launch begins to train.

    Args:
        folder: Of the checkpoints.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    with refuse_os_errors(folder, "written to"):
        (folder / _MARK).write_text(_launch_name(), encoding="utf-8")


def _launch_name() -> str:
    """Name the job as torchrun does, which may come again, and the process that starts ranks."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8")
        started = stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {parent} {started}"
