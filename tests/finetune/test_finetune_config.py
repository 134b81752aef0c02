"""Settings check themselves, and every shipped config loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dmt_convert.errors import ConfigError
from dmt_convert.training import FinetuneConfig, merge_settings, read_settings
from support.paths import REPOSITORY

WRONG = [
    ("epochs", 0),
    ("epochs", 1.5),
    ("max_steps", 0),
    ("batch_size", -1),
    ("eval_every", 0),
    ("patience", 0),
    ("dense_lr", -1.0),
    ("dense_lr", math.nan),
    ("table_lr", math.inf),
    ("table_lr", "0.1"),
    ("table_optimizer", "lamb"),
    ("initial_accumulator", -1.0),
    ("warmup_steps", -1),
    ("lr_decay", "step"),
    ("clip_norm", 0.0),
    ("seed", True),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: "):
        FinetuneConfig(**{name: value})


def test_steps_follow_from_passes_or_are_given() -> None:
    assert FinetuneConfig(epochs=2, batch_size=100).total_steps(250) == 6
    assert FinetuneConfig(max_steps=7).total_steps(250) == 7
    assert FinetuneConfig(batch_size=10).steps_between_evaluations(1000) == 10
    assert FinetuneConfig(batch_size=10, max_steps=20).steps_between_evaluations(1000) == 2
    assert FinetuneConfig(batch_size=1000).steps_between_evaluations(10) == 1
    assert FinetuneConfig(eval_every=3).steps_between_evaluations(10) == 3


def test_every_shipped_config_loads() -> None:
    files = sorted((REPOSITORY / "recipes" / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        settings = read_settings(file)
        assert FinetuneConfig(**settings) != FinetuneConfig(), file
        first = file.read_text("utf-8").splitlines()[0]
        assert first.startswith("# python -m dmt_convert.recipes.finetune_dmt"), file
        assert f"--config recipes/configs/{file.name}" in first, file


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("epoch: 1\n", "not known: epoch"),
        ("- 1\n", "holds list"),
        ("epochs: 0\n", "epochs: 0"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=found):
        read_settings(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "none.yaml")


def test_options_override_a_config() -> None:
    base = {"epochs": 3, "dense_lr": 0.5}
    assert merge_settings(base, {"dense_lr": None, "seed": 2}) == FinetuneConfig(
        epochs=3, dense_lr=0.5, seed=2
    )
    assert merge_settings(base, {"max_steps": 4}).total_steps(10**6) == 4
    assert merge_settings({"max_steps": 4}, {"epochs": 2}).max_steps is None
