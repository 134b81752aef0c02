"""Ranks that train tiny models; torch is imported once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cluster.client import RunRanks, serve_ranks
from support.rows import write_schema


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """Run a scenario on hosts x ranks: `run_ranks(2, 2, "train_against_flat", towers=...)`.

    Returns what it gave on every rank.
    """
    pytest.importorskip("torchrec", reason="trains over ranks, which needs torchrec")
    with serve_ranks("engine_scenarios") as run:

        def scenario(
            hosts: int, ranks_per_host: int, name: str, *, job: Any = None, **options: Any
        ) -> list[dict[str, Any]]:
            job = {"ranks_per_host": ranks_per_host, "seconds": 240, **(job or {})}
            reports = run(hosts * ranks_per_host, name, job=job, **options)
            return [report["result"] for report in reports]

        yield scenario


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 90 rows to train on, of which 41 to measure on; ids are below 20."""
    folder = tmp_path_factory.mktemp("clicks")
    names = [f"f{i}" for i in range(6)]
    for name, count in (("train", 90), ("valid", 41)):
        rng = np.random.default_rng(0)
        sparse = rng.integers(0, 20, (90, len(names)))[:count]
        np.savez(
            folder / f"{name}.npz",
            dense=rng.standard_normal((90, 5))[:count].astype(np.float32),
            sparse=sparse.astype(np.int32),
            label=(sparse[:, 0] % 2).astype(np.uint8),
        )
    write_schema(folder, names)
    return folder
