"""A short run of benchmarks/fuzz_checkpoints.py: all containers, hostile pickles among them."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.checkpoint.inert import unpickler
from dmt_convert.checkpoint.readers import registry
from support.paths import REPOSITORY

MUTATIONS, MAX_SECONDS = 8, 5.0


@pytest.fixture(scope="module")
def benchmarks() -> tuple[ModuleType, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import fuzz_checkpoints
        import mutate_checkpoints
    return fuzz_checkpoints, mutate_checkpoints


@pytest.fixture(scope="module")
def seeds(benchmarks, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("seeds")
    return root, benchmarks[1].write_seeds(root)


def test_every_container_has_a_seed(seeds):
    formats = {open_checkpoint(path).format for path in seeds[1].values()}
    assert formats == {reader.format for reader in registry.READERS}


def test_mutations_of_every_container(benchmarks, seeds):
    fuzz, mutations = benchmarks
    root, paths = seeds
    assert {kind: fuzz.outcome(path) for kind, path in paths.items()} == dict.fromkeys(
        paths, "read"
    )
    counts: Counter[str] = Counter()
    for kind in paths:
        for number in range(MUTATIONS):
            path = mutations.prepare(paths, root, root / "work", (kind, number), 1)
            begin = time.process_time()
            said = fuzz.outcome(path)
            assert said in ("read", "refused"), (kind, number, said)
            assert time.process_time() - begin < MAX_SECONDS, (kind, number)
            counts[said] += 1
    assert min(counts.values()) > len(paths) // 2, counts
    assert not (root / "it_ran").exists()


def test_a_reader_that_breaks_is_noticed(benchmarks, seeds, monkeypatch):
    def break_down(path: Path) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(registry, "_open", break_down)
    assert benchmarks[0].outcome(seeds[1]["torch"]).startswith("FAILED: ")


def test_code_that_runs_is_noticed(benchmarks, seeds, monkeypatch):
    root, paths = seeds

    def call(function: object, args: tuple[object, ...]) -> object:
        name = getattr(function, "name", "")
        return os.system(*args) if name == "posix.system" else honest(function, args)  # type: ignore[arg-type]

    honest = unpickler.call
    monkeypatch.setattr(unpickler, "call", call)
    benchmarks[0].outcome(paths["hostile"])
    assert (root / "it_ran").exists()
    (root / "it_ran").unlink()
