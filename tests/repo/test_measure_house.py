"""`scripts/measure_house.py` counts what it says; the commands that it can run are not run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY

CONFIG = '''"""A config.

Two more lines.
"""

from dataclasses import dataclass
from typing import (
    Any,
)

Pair = tuple[int, int]
CHECKS = {"table_lr": float, "tables": 3}


@dataclass
class TrainConfig:
    table_lr: float = 0.1
    """Of the tables."""
    # a comment
    other: Any = None  # not a line of its own


@dataclass
class Result:
    table_lr: float = 0.1
'''
COMMAND = """from typing import Annotated

LAUNCHING = {"dense_lr"}
Pair = tuple[str, str]
Number = 3


def run(table_lr: Annotated[float, option("--table-lr")] = 0.1, *rest: int, **more: int) -> None:
    train(
        table_lr=table_lr,
    )


def relay(table_lr: float, dense_lr: float) -> None:
    print("--table-lr is an option")


class Train:
    def run(self, a, b, c, d, e, f, g): ...
"""
RECIPE = """add("--table-lr", type=float)
add("--dense-lr/--no-dense-lr")
"""
DOCS = """| option | key | |
|---|---|---|
| `--table-lr` | `table_lr` | of the tables |
| `--epochs` | `epochs` | not `table_lr` |
Give `table_lr` in the file.
"""


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    files = {
        "dmt_convert/train/config.py": CONFIG,
        "dmt_convert/__init__.py": "",
        "cli/command.py": COMMAND,
        "recipes/recipe.py": RECIPE,
        "docs/train.md": DOCS,
        "README.md": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = REPOSITORY / "scripts" / "measure_house.py"
    command = [sys.executable, str(script), "--repo", str(tmp_path), "--no-runs", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_lines_and_functions(measured: dict[str, Any]) -> None:
    library = measured["library"]
    assert library["files"] == 4
    assert library["docstrings"] == 5
    assert library["comments"] == 1
    assert library["imports"] == 5
    assert library["code"] == 13 + 12 + 2
    assert library["functions"] == 3
    assert library["longest_function"] == "4 cli/command.py:8 run"
    assert measured["many_parameters"] == ["cli/command.py:19 run (7)"]
    assert measured["folders"]["dmt_convert/train"]["files"] == 1


def test_names_that_two_modules_define(measured: dict[str, Any]) -> None:
    assert measured["defined_twice"] == {"Pair": 2}


def test_places_that_spell_a_setting(measured: dict[str, Any]) -> None:
    assert measured["settings"]["table_lr"] == {
        "fields": 1,
        "options": 2,
        "keys": 1,
        "lists": 0,
        "docs": 1,
        "places": 5,
        "files": 4,
        "passed_on": 1,
        "where": [
            "cli/command.py:8",
            "dmt_convert/train/config.py:12",
            "dmt_convert/train/config.py:17",
            "docs/train.md:3",
            "recipes/recipe.py:1",
        ],
    }
    dense = measured["settings"]["dense_lr"]
    assert (dense["lists"], dense["options"], dense["places"]) == (1, 1, 2)
