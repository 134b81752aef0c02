"""What is printed reaches people in any locale, and nobody is told that a reader had enough."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import run_dmt

NAME = "模型-ümlaut"


@pytest.fixture
def named(flat: Path, tmp_path: Path) -> Path:
    folder = tmp_path / NAME
    folder.mkdir()
    return Path(shutil.copy(flat, folder / "flat.pt"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_path_that_the_encoding_does_not_have(named: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    run = run_dmt("inspect", named, env=environment, encoding=encoding)
    assert run.code == 0, run.stderr
    assert "\\u6a21\\u578b" in run.stdout
    run = run_dmt("inspect", named, "--json", env=environment, encoding=encoding)
    assert run.code == 0, run.stderr
    assert json.loads(run.stdout)["files"][0]["path"] == str(named)
    assert run.stdout.isascii()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["data", "--help"], ["inspect", "ckpt.pt"], ["nonsense"]]
)
def test_a_closed_pipe_ends_quietly(flat: Path, arguments: list[str]) -> None:
    arguments = [str(flat) if value == "ckpt.pt" else value for value in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dmt_convert.cli.main", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == (2 if arguments == ["nonsense"] else 0), done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert "bug" not in done.stderr


def test_help_survives_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "dmt_convert.cli.main"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Say what a data set would feed a model" in done.stdout
    done = subprocess.run([*command, "data", "--help"], capture_output=True, text=True, timeout=120)
    assert "dmt data ckpt.pt clicks/test.npz" in done.stdout
