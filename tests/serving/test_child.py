"""Processes of our own run nothing that lies in the current folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dmt_convert.child import python_command, python_environment
from support.paths import REPOSITORY

HIJACK = "open({ran!r}, 'a').write(__file__)\nraise ImportError('of the current folder')\n"
GRANDCHILD = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'secrets'], check=True)"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose files are called like modules; the file in which they say they ran."""
    ran = tmp_path / "ran.txt"
    folder = tmp_path / "cwd"
    folder.mkdir()
    for name in ("numpy", "torch", "json", "random", "queue", "secrets", "onnxruntime"):
        (folder / f"{name}.py").write_text(HIJACK.format(ran=str(ran)))
    monkeypatch.chdir(folder)
    return ran


@pytest.mark.parametrize("arguments", [("-c", "import json, secrets"), ("-c", GRANDCHILD)])
def test_no_module_of_the_current_folder_runs(hostile: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(python_command(*arguments), env=python_environment(), check=False)
    assert done.returncode == 0
    assert not hostile.exists()


def test_without_it_they_would(hostile: Path) -> None:
    subprocess.run([sys.executable, "-m", "secrets"], capture_output=True, check=False)
    assert "secrets.py" in hostile.read_text()


def test_the_environment_is_this_ones_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMT_KEPT", "1")
    environment = python_environment({"DMT_ADDED": "2"})
    assert environment["DMT_KEPT"] == "1" and environment["DMT_ADDED"] == "2"
    assert environment["PYTHONSAFEPATH"] == "1"


def test_python_is_started_in_one_way_only() -> None:
    """`sys.executable` in the library is a way around the helper; a launch is printed with it."""
    library = REPOSITORY / "dmt_convert"
    own = {library / "child.py", library / "cluster/launcher.py"}
    around = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in sorted(set(library.rglob("*.py")) - own)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "executable"
    ]
    assert around == []
