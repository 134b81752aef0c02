"""Rules that every tracked file keeps."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import REPOSITORY

MAX_LINES = 750
MACHINE_PATH = re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm)/", re.MULTILINE)
# import-linter sees cli/ and recipes/ under these names only, so here the other names are refused.
MAPPED = ("dmt_convert.cli", "dmt_convert.recipes")


def tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [path for name in listed.splitlines() if (path := REPOSITORY / name).is_file()]


def mapped_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if f"{name}.".startswith(tuple(f"{m}." for m in MAPPED)))


def test_no_module_is_long() -> None:
    python = [path for path in tracked() if path.suffix == ".py"]
    lengths = {str(path): len(path.read_text("utf-8").splitlines()) for path in python}
    assert len(lengths) > 10
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_no_tracked_file_names_a_machine_path() -> None:
    found = [
        str(path)
        for path in tracked()
        if MACHINE_PATH.search(path.read_bytes().decode("utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("prefix", ["", "see ", "'"])
def test_machine_paths_are_recognised(prefix: str) -> None:
    assert MACHINE_PATH.search("first line\n" + prefix + "/".join(["", "work", "file"]))
    assert not MACHINE_PATH.search(prefix + "my/work/file")


def test_mapped_packages_are_imported_by_tests_only() -> None:
    found = {
        str(path): names
        for folder in ("dmt_convert", "cli", "recipes")
        for path in (REPOSITORY / folder).rglob("*.py")
        if (names := list(mapped_imports(path.read_text("utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dmt_convert import cli", ["dmt_convert.cli"]),
        ("import dmt_convert.recipes.demo", ["dmt_convert.recipes.demo"]),
        ("def f():\n    from dmt_convert.cli.main import main", ["dmt_convert.cli.main.main"]),
        ("from . import main", []),
        ("import dmt_convert.client", []),
    ],
)
def test_mapped_imports_are_recognised(source: str, found: list[str]) -> None:
    assert list(mapped_imports(source)) == found
