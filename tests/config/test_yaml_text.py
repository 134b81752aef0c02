"""YAML as people write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmt_convert.config import FinetuneConfig, load_yaml, read_settings
from dmt_convert.errors import ConfigError
from dmt_convert.families import read_model_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("3", 3),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("f1e4", "f1e4"),
        ("[1e-4, 2]", [1e-4, 2]),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_settings_take_such_numbers(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dense_lr: 1e-4\ntable_lr: 2E-3\n")
    found = read_settings(file, FinetuneConfig)
    assert found == {"dense_lr": 1e-4, "table_lr": 2e-3}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' stands there twice"),
        ("data: &a [1]\nout: *a", "alias"),
        ("a: [", "while parsing"),
        ("? [1]\n: 2", "unhashable"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_settings(file, FinetuneConfig)
    assert found in caught.value.found
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_config(file)


@pytest.mark.parametrize("text", ["[" * 100, "a: " + "{a: " * 100, "[" * 100_000])
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"nest|depth"):
        load_yaml(text)
