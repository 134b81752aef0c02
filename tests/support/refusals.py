"""A folder with a good checkpoint, the means to spoil it, and what a refusal looks like."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from support.checkpoints.flat import make_flat
from support.commands import Run

Arguments = Sequence[object]


class Scene:
    """A folder with a good checkpoint and the means to spoil it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = make_flat(folder / "ckpt.pt")

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def subfolder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir()
        return path

    def cut(self, name: str, keep: float) -> Path:
        path = make_flat(self.folder / f"whole{Path(name).suffix}")
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


def check_refusal(run: Run, error: str, found: str) -> None:
    """Hold a run of `dmt --json` against what a refusal must be."""
    assert run.code == (2 if error == "UsageError" else 3), run
    value = json.loads(run.stdout)
    assert list(value) == ["error", "found", "expected", "hint", "details"]
    assert value["error"] == error
    assert found in run.stderr
    assert value["expected"] or error == "UsageError"  # which says it in what was found
    assert value["hint"]
    assert "Traceback" not in run.stderr
    assert run.stderr.startswith(f"error: {value['found']}")
    assert f"\nexpected: {value['expected']}" in run.stderr or not value["expected"]
    assert "\ntry: " in run.stderr
