"""A folder with a good checkpoint, the means to spoil it, and what a refusal looks like."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

Maker = Callable[..., Path]
Arguments = Sequence[object]


class Scene:
    """A folder with a good checkpoint and the means to spoil it."""

    def __init__(self, folder: Path, make: Maker) -> None:
        self.folder, self.make = folder, make
        self.good = make(folder / "ckpt.pt")

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def cut(self, name: str, keep: float) -> Path:
        path = self.make(self.folder / f"whole{Path(name).suffix}")
        return self.file(name, path.read_bytes()[: int(keep * path.stat().st_size)])

    def saved(self, value: object, **options: Any) -> Path:
        torch.save(value, self.folder / "saved.pt", **options)
        return self.folder / "saved.pt"

    def partition(self, value: object) -> Arguments:
        return self.good, "--partition", self.file("towers.json", json.dumps(value))

    def bundle(self) -> Path:
        out = self.folder / "out"
        out.mkdir()
        (out / "dmt.json").write_text("{}")
        return out


@pytest.fixture
def scene(tmp_path: Path, make_flat: Maker) -> Scene:
    return Scene(tmp_path, make_flat)


def read_files(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): "link" if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }


@pytest.fixture(scope="session")
def listing() -> Callable[[Path], dict[str, bytes | str]]:
    """Read every file below a folder."""
    return read_files


def check_refusal(run: Any, error: str, found: str) -> None:
    assert run.code == 3, run
    value = json.loads(run.stdout)
    assert list(value) == ["error", "found", "expected", "hint", "details"]
    assert value["error"] == error
    assert found in run.stderr
    assert value["expected"]
    assert value["hint"]
    assert "Traceback" not in run.stderr
    assert run.stderr.startswith(f"error: {value['found']}")
    assert f"\nexpected: {value['expected']}" in run.stderr
    assert "\ntry: " in run.stderr


@pytest.fixture(scope="session")
def check_refused() -> Callable[[Any, str, str], None]:
    """Hold a run against what a refusal must be: `check_refused(run, error class, text)`."""
    return check_refusal
