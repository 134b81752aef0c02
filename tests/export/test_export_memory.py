"""Exporting and loading a bundle far larger than memory: its tables are holes of sparse files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

MEGABYTES = 1000


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("size", "quantize"), [(40, "none"), (40, "int8"), (8, "int4")])
def test_memory_stays_small(tmp_path: Path, size: int, quantize: str) -> None:
    script = REPOSITORY / "benchmarks" / "export_memory.py"
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(script), "--gb", str(size), "--quantize", quantize]
    command += ["--folder", str(tmp_path), "--out", str(figures)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["export"]["peak_mb"] < MEGABYTES
    assert found["load"]["loaded_mb"] < MEGABYTES
    assert found["load"]["own_mb"] < MEGABYTES
    assert found["load"]["load_s"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
