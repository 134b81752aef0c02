"""The serving benchmark: its inputs, its verdicts, and a run at tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from support.paths import REPOSITORY

SCRIPT = "serving_latency.py"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return REPOSITORY / "benchmarks"


@pytest.fixture
def case_module(benchmarks: Path) -> ModuleType:
    import serving_case

    return serving_case


@pytest.mark.parametrize("ids", ["uniform", "zipf"])
def test_every_process_draws_the_same_ids_inside_the_tables(
    case_module: ModuleType, ids: str
) -> None:
    for form, most in (("single", 1), ("fixed", 4), ("jagged", 8)):
        case = case_module.Case(model="dlrm", form=form, rows=50, ids=ids)
        drawn, again = (case_module.draw_inputs(case, 300, 3) for _ in range(2))
        assert np.array_equal(drawn.all_values, again.all_values)
        assert drawn.all_values.min() == 0 and drawn.all_values.max() == 49
        assert drawn.all_lengths.max() == most and drawn.all_lengths.sum() == drawn.all_values.size
        assert (drawn.all_lengths == 0).any() == (form == "jagged")


def test_verdicts_take_the_fastest_of_both_sides_and_know_the_spread(benchmarks: Path) -> None:
    from serving_results import judge, show_tables, show_verdicts, summarise

    def result(variant: str, ms: float, spread: float = 0.0, model: str = "dcn") -> object:
        seconds = [1e-3 * (ms - spread), 1e-3 * ms, 1e-3 * (ms + spread)]
        where = {"model": model, "form": "single", "part": "model", "threads": 1, "batch": 64}
        return summarise(seconds, 0, variant=variant, **where)

    results = [
        result("eager", 5.0),
        result("tbe", 4.0),
        result("tbe-int8", 2.0),
        result("flat-onnx", 4.2, spread=0.8),
        result("flat-pt2", 9.0),
        result("dmt-c4-onnx", 3.0),
    ]
    verdicts = {(v["ours"], v["against"]): v for v in judge(results)}
    assert verdicts["flat-onnx", "tbe"]["verdict"] == "within the spread"
    assert verdicts["flat-pt2", "tbe"]["verdict"] == "not met"
    assert verdicts["flat-onnx", "tbe-int8"]["verdict"] == "not met"
    assert verdicts["dmt-c4-onnx", "flat-onnx"]["verdict"] == "met"
    assert verdicts["dmt-c4-onnx", "flat-onnx"]["ratio"] == pytest.approx(1.4)
    assert "| tbe | c | 4 (4-4), 16,000 |" in list(show_tables(results))
    assert any(
        line.endswith("plain graph, at least 1.5x: not measured")
        for line in show_verdicts(judge(results))
    )


def test_another_answer_is_beyond_the_limit(benchmarks: Path) -> None:
    from serving_rounds import _share

    rng = np.random.default_rng(0)
    truth = rng.standard_normal((256, 1)).astype(np.float32)
    assert _share(truth * np.float32(1 + 1e-6), truth, False) < 1
    assert _share(np.roll(truth, 1), truth, False) > 1
    assert _share(truth[:5], truth, False) == np.inf
    noisy = truth + 0.01 * rng.standard_normal(truth.shape).astype(np.float32)
    assert _share(noisy, truth, True) < 1 < _share(noisy, truth, False)
    assert _share(np.roll(truth, 1), truth, True) > 1


def command(benchmarks: Path, folder: Path, *options: str) -> list[str]:
    quick = ["--quick", "--models", "dlrm", "--forms", "jagged", "--folder", str(folder)]
    return [sys.executable, str(benchmarks / SCRIPT), *quick, *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.mark.exhaustive
def test_a_quick_run_compares_and_times_and_leaves_nothing(
    benchmarks: Path, tmp_path: Path
) -> None:
    variants = ["eager", "tbe", "tbe-int8", "torchrec-int8", "flat-onnx", "dmt-onnx", "dmt-c4-onnx"]
    options = ["--json", str(tmp_path / "out.json"), "--variants", *variants]
    done = subprocess.run(
        command(benchmarks, tmp_path / "work", *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {r["variant"] for r in found["results"]} == set(variants), done.stderr
    assert {r["batch"] for r in found["results"]} == {1, 64}
    differences = found["differences"]["dlrm jagged"]
    assert set(differences) == set(variants) and max(differences.values()) <= 1
    assert differences["tbe-int8"] > 0 and differences["dmt-c4-onnx"] > 0
    assert not (tmp_path / "work").exists()


@pytest.mark.exhaustive
def test_a_terminated_run_leaves_neither_files_nor_processes(
    benchmarks: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    process = subprocess.Popen(
        command(benchmarks, work, "--variants", "eager", "tbe"),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (work / "tbe.log").exists() and process.poll() is None:
            time.sleep(0.02)
        children = children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert len(children) == 2
    assert not work.exists()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
