"""`scripts/triton-server` refuses what would hang, before it installs anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.paths import REPOSITORY

SCRIPT = REPOSITORY / "scripts/triton-server"


def start(repository: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, str(repository)],
        cwd=folder,
        env={**os.environ, "DMT_TRITON_VENV": str(folder / "venv"), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tri ton", "a;b", "it's", "$HOME", "a(b)", "a\tb"])
@pytest.mark.parametrize("relative", [True, False])
def test_paths_that_the_server_cannot_use_are_refused(
    tmp_path: Path, name: str, relative: bool
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    done = start(name if relative else folder, tmp_path)
    assert done.returncode == 3
    assert f"cannot use the path '{folder}'" in done.stderr
    assert "try: ln -s " in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_inside_one_with_a_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "My Drive/models").mkdir(parents=True)
    done = start("models", tmp_path / "My Drive", DMT_TRITON_VENV=str(tmp_path / "venv"))
    assert done.returncode == 3 and "My Drive/models'" in done.stderr


def test_an_environment_that_the_server_cannot_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    done = start("models", tmp_path, DMT_TRITON_VENV=str(tmp_path / "my venv"))
    assert done.returncode == 3 and "my venv'" in done.stderr


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    done = start("nowhere", tmp_path)
    assert done.returncode == 3 and "nowhere is not a folder" in done.stderr
