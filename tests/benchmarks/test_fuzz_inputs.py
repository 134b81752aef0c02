"""A short run of benchmarks/fuzz_inputs.py: all kinds of inputs but checkpoints."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dmt_convert.data import readers
from support.paths import REPOSITORY
from support.shortcuts import sample_few, skip_export_checks, skip_report

MUTATIONS = 3


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import fuzz_inputs
    return fuzz_inputs


@pytest.fixture(scope="module")
def seeds(fuzz, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        sample_few(patch, 256)
        skip_report(patch)
        skip_export_checks(patch)
        return fuzz.make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    sample_few(monkeypatch, 256)
    skip_report(monkeypatch)
    skip_export_checks(monkeypatch)
    monkeypatch.setattr(sys, "stdout", sys.stdout)


@pytest.mark.filterwarnings("ignore")
def test_whole_inputs_are_answered(fuzz, seeds):
    for kind, seed in seeds.items():
        if kind in ("bundle", "plan", "npz", "criteo-tsv", "facts", "settings", "partition"):
            arguments = seed.commands[0](seed.folder)
            assert fuzz.outcome(arguments) == "answered", (kind, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutations_of_every_kind(fuzz, seeds, tmp_path):
    counts: Counter[str] = Counter()
    for kind, seed in seeds.items():
        for number in range(MUTATIONS):
            rng = random.Random(f"7 {kind} {number}")
            fuzz.prepare(seed, tmp_path / "copy", rng)
            said = fuzz.outcome(rng.choice(seed.commands)(tmp_path / "copy"))
            assert said in ("answered", "refused"), (kind, number, said)
            counts[said] += 1
    assert min(counts.values()) > 3, counts


def test_a_reader_that_breaks_is_noticed(fuzz, seeds, monkeypatch):
    def break_down(path: Path) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(readers, "open_data", break_down)
    monkeypatch.setattr("dmt_convert.data.open_data", break_down)
    seed = seeds["criteo-tsv"]
    assert fuzz.outcome(seed.commands[0](seed.folder)).startswith("FAILED: ")
