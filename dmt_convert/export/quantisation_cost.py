"""What quantised tables cost, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmt_convert.bundle import Bundle
from dmt_convert.errors import ExportError
from dmt_convert.serving import TableCode

Progress = Callable[[str, int, int], None]


def measure_quantisation(
    bundle: Bundle, code: TableCode, data: Path | None, progress: Progress
) -> dict[str, Any]:
    """Say how far quantised tables are from the stored ones, and what that does to the logits.

    Raises:
        DataError: The data does not fit the model.
    """
    if code == "none":
        return {}
    raise ExportError(
        f"--quantize {code}", expected="--quantize none", hint="it is not written yet"
    )
