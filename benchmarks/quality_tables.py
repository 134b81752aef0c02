"""Tables of figures over seeds, in markdown, and the settings above them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dmt_convert.recipes.train_flat import TrainConfig

Record = dict[str, Any]
"""One outcome of one seed: what it is, and its figures."""

TITLES: Final = {
    "auc": "AUC",
    "auc_lost": "AUC lost",
    "ne": "NE",
    "r2": "R^2 of logits",
    "rank_correlation": "rank correlation",
}
"""Figure -> column title."""


def mean_spread(values: Sequence[float], digits: int = 5) -> str:
    """Write a mean over seeds, and in brackets the largest minus the smallest."""
    if not len(values):
        return "-"
    return f"{np.mean(values):.{digits}f} ({np.ptp(values):.{digits}f})"


def group(records: Iterable[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Gather records that agree on some keys, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def print_table(
    records: Sequence[Record], keys: Mapping[str, str], figures: Mapping[str, str] = TITLES
) -> None:
    """Print one row per combination of keys.

    `keys` and `figures` map what a record calls it to the title of its column.
    """
    rows = []
    for values, members in group(records, list(keys)).items():
        cells = [show(value) for value in values]
        cells += [mean_spread([m[figure] for m in members]) for figure in figures]
        rows.append(cells)
    print_rows([*keys.values(), *figures.values()], rows)


def print_rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_machine(workers: int) -> str:
    return (
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}; "
        f"{workers} processes of 1 thread on {os.cpu_count()} cores"
    )


def describe_training(config: TrainConfig) -> str:
    return (
        f"flat models: {config.epochs} epochs of Adam, batch {config.batch_size}, learning rate "
        f"{config.learning_rate:g}, L2 penalty on tables {config.table_decay:g}, N = "
        f"{config.embedding_dim}, dense_arch {config.dense_layers}, over_arch "
        f"{config.over_layers}, {config.cross_layers} cross layers of rank {config.cross_rank}; "
        "the best validation epoch is kept"
    )


def write_json(
    path: Path | None, settings: Sequence[str], results: Mapping[str, Sequence[Record]]
) -> None:
    """Write every single outcome, where that is asked for."""
    if path is not None:
        path.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n")
