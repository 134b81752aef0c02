"""What tables take of a rank's memory in training: the one place where it is counted.

Tables are trained as float32, whatever they are stored as. A table that is too large lies in the
memory of the host (TorchRec's kernel `fused_uvm_caching`), and a rank's accelerator keeps the rows
in use.

Letters: R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from dmt_convert.config import TableOptimizerKind

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
"""A rule that moves tables, as a plan names it."""

COLS_MULTIPLE: Final = 4
"""The lookup kernels read rows in vectors of four elements."""
TRAINED_BYTES: Final = 4
"""Bytes of an element in training."""
STATE_PER_ELEMENT: Final[dict[TableOptimizer, int]] = {
    "rowwise_adagrad": 0,
    "adagrad": 4,
    "sgd": 0,
    "adam": 8,
}
"""Bytes of the optimizer's state per element of a table..."""
STATE_PER_ROW: Final[dict[TableOptimizer, int]] = {
    "rowwise_adagrad": 4,
    "adagrad": 0,
    "sgd": 0,
    "adam": 0,
}
"""...and per row. A table cut into n column shards therefore has n of them per row."""

CACHED_SHARE: Final = 0.2
"""Share of a host table's rows that the accelerator keeps if it is not known which are in use."""
_CACHED_LOOKUPS: Final = 0.95
"""Share of all lookups that kept rows should serve."""
_SLOT_BYTES: Final = 16
"""fbgemm's tag and time stamp of a kept row..."""
_INDEX_BYTES: Final = 4
"""...and its map from a row of the table to what is kept."""


def optimizer_in_plan(kind: TableOptimizerKind) -> TableOptimizer:
    """Return a setting's optimizer as a plan names it."""
    names: dict[TableOptimizerKind, TableOptimizer] = {
        "rowwise-adagrad": "rowwise_adagrad",
        "adagrad": "adagrad",
        "sgd": "sgd",
        "adam": "adam",
    }
    return names[kind]


def padded_dim(dim: int) -> int:
    """Return the columns that a rank keeps of a table of this dim: the next multiple of four."""
    return -(-dim // COLS_MULTIPLE) * COLS_MULTIPLE


def shard_bytes(
    rows: int,
    cols: int,
    *,
    optimizer: TableOptimizer = "rowwise_adagrad",
    cached: float | None = None,
    element_bytes: int = TRAINED_BYTES,
) -> int:
    """Return what a shard takes of an accelerator, with its optimizer's state, in bytes.

    Args:
        rows: R.
        cols: N; padded as in memory.
        optimizer: What moves it.
        cached: Share of the rows that are kept, if the table and its state lie in the host's
            memory.
        element_bytes: Size of an element.
    """
    width = padded_dim(cols)
    if cached is not None and rows:
        kept = int(rows * cached) + 1
        return kept * (width * element_bytes + _SLOT_BYTES) + rows * _INDEX_BYTES
    state = width * STATE_PER_ELEMENT[optimizer] + STATE_PER_ROW[optimizer]
    return rows * (width * element_bytes + state)


def copy_bytes(
    rows: int,
    cols: int,
    *,
    optimizer: TableOptimizer = "rowwise_adagrad",
    element_bytes: int = TRAINED_BYTES,
) -> int:
    """Return what a table takes of every rank that all hold: with its whole gradient, too."""
    state = cols * STATE_PER_ELEMENT[optimizer] + STATE_PER_ROW[optimizer]
    return rows * (cols * (element_bytes + TRAINED_BYTES) + state)


def cached_share(counts: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """Return the share of rows that serves nearly all lookups.

    Args:
        counts: How often every row of a table was looked up, in data like the training's.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.int64))[::-1]
    total = int(ordered.sum())
    if not total:
        return CACHED_SHARE
    needed = int(np.searchsorted(ordered.cumsum(), _CACHED_LOOKUPS * total)) + 1
    return max(1e-4, min(1.0, needed / len(ordered)))
