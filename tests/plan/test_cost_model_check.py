"""benchmarks/cost_model_check.py finds constants that were put in, and sees what does not fit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster.results import Row
from benchmarks.cluster.settings import Settings, parse_topology
from dmt_convert.errors import DataError
from support.paths import REPOSITORY

TOPOLOGIES = ("4x2", "8x1", "2x4", "8x2")
RATES = (100.0, 200.0, 500.0)
VARIANTS = ("flat", "flat-bf16", "torchrec-towers-c4", "sptt", "dmt-c2", "dmt-c8", "dmt-c8-bf16")
CONSTANTS = np.array([0.02, 2e-4, 3e-9, 1.05, 4e4])
MODULES = ("emulated_runs", "emulated_model", "cost_model_check")

Write = Callable[..., Path]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path, check: dict[str, ModuleType]) -> Write:
    """Write results as the benchmark does, of steps that the model's form explains."""
    model, runs = check["emulated_model"], check["emulated_runs"]

    def results(noise: float = 0.0, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        settings = Settings(
            topologies=tuple(map(parse_topology, TOPOLOGIES)), rates=RATES, variants=VARIANTS
        )
        random = np.random.default_rng(0)
        launches = []
        for topology in settings.topologies:
            rows = []
            for rate in RATES:
                for variant in VARIANTS:
                    run = runs.Run(
                        hosts=topology.hosts,
                        ranks=topology.ranks_per_host,
                        cores=2,
                        rate_mbit=rate,
                        variant=variant,
                        compute_ms=0.0,
                        step_ms=1.0,
                        cpu_ms=None,
                        link_mb=None,
                        batch=settings.batch,
                        pooling=settings.pooling,
                        features=settings.features,
                        dim=settings.dim,
                    )
                    spread = 1 + noise * random.uniform(-1, 1)
                    sent = model.count(run).link_bytes + 4e4 * 4 * model.ring_share(run)
                    row = Row(
                        topology=topology.name,
                        rate_mbit=rate,
                        variant=variant,
                        steps=8,
                        step_ms=model.predict_ms(run, CONSTANTS) * spread,
                        step_ms_q1=0.0,
                        step_ms_q3=0.0,
                        cpu_ms=100.0,
                        link_mb=1.04 * sent / 1e6,
                        link_ms=1.0,
                        cpu_bound=False,
                        over_flat=None,
                        over_torchrec_towers=None,
                        model_ms=None,
                    )
                    rows.append(asdict(row))
            launches.append({"topology": topology.name, "rows": rows})
        document = {
            "schema_version": 1,
            "machine": {"cores": 2},
            "settings": settings.to_json(),
            "topologies": launches,
        }
        if change is not None:
            change(document)
        path = tmp_path / "results.json"
        path.write_text(json.dumps(document), "utf-8")
        return path

    return results


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "benchmarks" / "cost_model_check.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def test_constants_that_were_put_in_are_found(check: dict[str, ModuleType], write: Write) -> None:
    runs = check["emulated_runs"].read_runs(write())
    assert len(runs) == len(TOPOLOGIES) * len(RATES) * len(VARIANTS)
    found = check["emulated_model"].fit(runs)
    assert found == pytest.approx(CONSTANTS, rel=1e-6)
    guesses = check["cost_model_check"].cross_check(runs)
    assert len(guesses) == len(runs)
    assert max(abs(guess.error) for guess in guesses) < 1e-6
    assert all(abs(g.speedup_error) < 1e-6 for g in guesses if g.speedup_error is not None)


def test_errors_are_of_the_size_of_the_noise(write: Write, check: dict[str, ModuleType]) -> None:
    path = write(noise=0.05)
    median = check["cost_model_check"].median_error(
        check["cost_model_check"].cross_check(check["emulated_runs"].read_runs(path))
    )
    assert 0.005 < median < 0.05
    done = run_script(path, "--at-most", 0.06)
    assert done.returncode == 0, done.stderr
    for text in ("84 rows", "2x4", "4x2", "8x1", "8x2", "where it fails most", "4.0% of headers"):
        assert text in done.stdout


def triple_a_topology(document: dict[str, Any]) -> None:
    for row in document["topologies"][1]["rows"]:
        row["step_ms"] *= 3


def swap_variants(document: dict[str, Any]) -> None:
    names = {"flat": "dmt-c8", "dmt-c8": "flat"}
    for launch in document["topologies"]:
        for row in launch["rows"]:
            row["variant"] = names.get(row["variant"], row["variant"])


def shuffle_rates(document: dict[str, Any]) -> None:
    for launch in document["topologies"]:
        for row in launch["rows"]:
            row["rate_mbit"] = {100.0: 500.0, 500.0: 100.0}.get(row["rate_mbit"], 200.0)


@pytest.mark.slow
@pytest.mark.parametrize("change", [triple_a_topology, swap_variants, shuffle_rates])
def test_what_does_not_fit_is_noticed(
    write: Write, change: Callable[[dict[str, Any]], None]
) -> None:
    done = run_script(write(noise=0.02, change=change), "--at-most", 0.08)
    assert done.returncode == 4, done.stdout
    assert "is above 8.0%" in done.stderr


def test_modelled_compute_is_no_part_of_the_constants(
    check: dict[str, ModuleType], write: Write
) -> None:
    def sleep(document: dict[str, Any]) -> None:
        document["settings"]["compute_ms"] = 150.0
        for launch in document["topologies"]:
            for row in launch["rows"]:
                row["step_ms"] += 150.0

    runs = check["emulated_runs"].read_runs(write(change=sleep))
    assert check["emulated_model"].fit(runs) == pytest.approx(CONSTANTS, rel=1e-6)


def one_topology(document: dict[str, Any]) -> None:
    del document["topologies"][1:]


def break_rows(document: dict[str, Any]) -> None:
    document["topologies"][0]["rows"][3]["step_ms"] = -1
    document["topologies"][1]["rows"][0]["variant"] = "magic"
    del document["topologies"][2]["rows"][1]["rate_mbit"]


def newer(document: dict[str, Any]) -> None:
    document["schema_version"] = 2


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (one_topology, "4x2 alone do not determine 5 constants"),
        (break_rows, "3 rows that are none"),
        (newer, "schema_version 2"),
        (lambda document: document.pop("settings"), "KeyError('settings')"),
        (lambda document: document.update(topologies=[]), "no rows"),
    ],
)
def test_files_that_say_too_little_are_refused(
    write: Write, change: Callable[[dict[str, Any]], None], found: str
) -> None:
    done = run_script(write(change=change))
    assert done.returncode == 3
    assert found in done.stderr
    assert "expected:" in done.stderr and "try:" in done.stderr


def test_a_missing_file_is_refused(check: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.json cannot be read"):
        check["emulated_runs"].read_runs(tmp_path / "missing.json")


def test_the_first_measured_runs_are_met(check: dict[str, ModuleType]) -> None:
    """What docs/prediction.md says of them."""
    path = REPOSITORY / "benchmarks" / "first_cluster_runs.json"
    runs = check["emulated_runs"].read_runs(path)
    guesses = check["cost_model_check"].cross_check(runs)
    assert check["cost_model_check"].median_error(guesses) < 0.06
    slow = [guess for guess in guesses if guess.run.rate_mbit < 500]
    assert max(abs(guess.error) for guess in slow) < 0.16
    constants = check["emulated_model"].fit(runs)
    assert (constants >= 0).all()
    assert 0.85 < constants[3] < 1.16


def test_bytes_are_the_cost_models(check: dict[str, ModuleType]) -> None:
    """4x2, flat: (H-1)/H of 26 vectors of 128 floats, twice, and ids once, for both ranks."""
    runs = check["emulated_runs"].read_runs(REPOSITORY / "benchmarks" / "first_cluster_runs.json")
    flat = next(r for r in runs if (r.topology, r.variant) == ("4x2", "flat"))
    samples = 2 * 256 * 3 / 4
    expected = samples * 26 * (2 * 128 * 4 + 8)
    assert check["emulated_model"].count(flat).link_bytes == pytest.approx(expected)
    small = next(r for r in runs if (r.topology, r.variant) == ("4x2", "dmt-c8"))
    expected = samples * 26 * (2 * 16 * 4 + 8)
    assert check["emulated_model"].count(small).link_bytes == pytest.approx(expected)
