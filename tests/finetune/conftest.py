"""A tiny bundle, rows whose labels can be learnt, and servers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from support.bundles import make_bundle
from support.cluster.client import RunRanks, serve_ranks, serve_recipe
from support.cluster.recipe_runs import COMMON, Tuned, make_wide, write_wide_rows
from support.rows import write_clicks


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.npz and valid.npz."""
    folder = tmp_path_factory.mktemp("rows")
    write_clicks(folder, "train", 2000, seed=0)
    write_clicks(folder, "valid", 500, seed=1)
    return folder


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # codes send rounded gradients over ranks, so ranks and one process would differ
    return make_bundle(tmp_path_factory.mktemp("bundle"), dim=4)


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """Run a scenario over ranks: `run_ranks(4, "save", folder=..., steps=...)`."""
    with serve_ranks("checkpoint_scenarios") as run:
        yield run


@pytest.fixture(scope="session")
def run_recipe() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run the recipe over ranks: `run_recipe(hosts=2, ranks=1, ...)`."""
    with serve_recipe() as run:
        yield run


@pytest.fixture(scope="session")
def cluster_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # float32: codes round gradients between ranks, so ranks and one process would differ
    return make_wide(tmp_path_factory.mktemp("wide"), c=1, compression=4)


def _without_mapping(printed: str) -> str:
    """Leave out which columns feed the model, which every training says."""
    lines = printed.splitlines(keepends=True)
    return "".join(line for line in lines if ", in this order: " not in line)


@pytest.fixture(scope="session")
def tune_in(wide: Path, cluster_rows: Path, run_recipe: Callable[..., Any]) -> Callable[..., Tuned]:
    """Run the recipe in a folder on HOSTS x RANKS."""

    def run(
        folder: Path,
        cluster: str,
        *options: object,
        name: str = "a",
        bundle: Path = wide,
        data: Path = cluster_rows,
        ends: bool = True,
        notes: str | None = "",
        without: int | None = None,
        **job: Any,
    ) -> Tuned:
        hosts, ranks = map(int, cluster.split("x"))
        out = folder / name / "new"
        out.parent.mkdir(exist_ok=True)
        shared = list(COMMON)
        if without is not None:  # leave out the option at this place
            del shared[without : without + 2]
        common = ("--bundle", bundle, "--data", data, "--out", out, *shared)
        arguments = [str(argument) for argument in (*common, *options)]
        done = run_recipe(hosts=hosts, ranks=ranks, arguments=arguments, **job)
        last = done["attempts"][-1]
        if ends:
            assert [rank["code"] for rank in last] == [0] * (hosts * ranks), last
            said = {_without_mapping(rank["stderr"]) for rank in last}
            assert notes is None or said <= {"", notes}
        return Tuned(out=out, attempts=done["attempts"], seconds=done["seconds"])

    return run


@pytest.fixture
def tune(tmp_path: Path, tune_in: Callable[..., Tuned]) -> Callable[..., Tuned]:
    return partial(tune_in, tmp_path)
