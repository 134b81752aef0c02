"""Runs of the fine-tuning recipe over ranks, on a bundle with wide tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.checkpoint import read_tensor
from support.bundles import make_bundle
from support.rows import write_clicks

WIDE_TABLES = (7, 400, 9, 6)
# the last batch of a pass has 10 rows: four ranks get 3, 3, 3 and 1
COMMON = ("--batch-size", 74, "--eval-every", 4, "--checkpoint-every", 3, "--max-steps", 16)
"""Options of every run."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a run."""

    out: Path
    attempts: list[list[dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.out)

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = self.bundle.manifest.initialisation["finetune"]
        return found

    @property
    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }

    @property
    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        bundle = self.bundle
        groups = [bundle.dense, *bundle.towers, *bundle.accumulator_files.values()]
        return {
            f"{t} {name}": read_tensor(info).astype(np.float32)
            for t, tensors in enumerate(groups)
            for name, info in tensors.items()
        }

    @property
    def printed(self) -> str:
        return "".join(rank["stdout"] for ranks in self.attempts for rank in ranks)


def write_wide_rows(folder: Path) -> Path:
    """A folder of rows to train and to measure on."""
    write_clicks(folder, "train", 602, seed=0, tables=WIDE_TABLES)
    write_clicks(folder, "valid", 203, seed=1, tables=WIDE_TABLES)
    return folder


def make_wide(
    folder: Path,
    *,
    edit: Callable[[dict[str, Any]], object] | None = None,
    dim: int = 64,
    **options: Any,
) -> Path:
    """A bundle of two towers, its tables wide enough to be cut into columns.

    Options are fields of `ConvertConfig`.
    """
    return make_bundle(folder, flat={"rows": WIDE_TABLES, "dim": dim, "edit": edit}, **options)
