"""The wheel holds the whole tree under one top-level name."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from support.paths import REPOSITORY

OPTIONS = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
SOURCES = {"dmt_convert": "dmt_convert", "cli": "dmt_convert/cli", "recipes": "dmt_convert/recipes"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    for folder in SOURCES:
        shutil.copytree(REPOSITORY / folder, tree / folder)
    out = tree / "wheels"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *OPTIONS, "--wheel-dir", str(out), str(tree)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_one_top_level_name(wheel: set[str]) -> None:
    names = {name.split("/")[0] for name in wheel}
    assert {name for name in names if not name.endswith(".dist-info")} == {"dmt_convert"}


def test_every_file_of_the_tree_is_there(wheel: set[str]) -> None:
    expected = {
        f"{target}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, target in SOURCES.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "dmt_convert/cli/__init__.py" in expected
    assert sorted(expected - wheel) == []
    shipped = {name for name in wheel if name.startswith("dmt_convert/")}
    assert sorted(shipped - expected) == []


def test_licence_and_command_are_there(wheel: set[str]) -> None:
    info = {name.split("/", 1)[1] for name in wheel if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= info
