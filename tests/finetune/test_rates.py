"""Rates follow from how well the bundle agrees with the flat model, unless they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmt_convert.bundle import Bundle, open_bundle
from dmt_convert.config import TrainingConfig
from dmt_convert.documents import Quality, QualityRow
from dmt_convert.recipes.finetune_dmt import main
from dmt_convert.training import choose_rates
from support.bundles import convert_quickly

FULL, CLOSE = (5e-4, 0.02), (0.0, 0.002)
"""Rates of the dense parts and of the tables."""


def with_rows(bundle: Bundle, *rows: tuple[str, float | None]) -> Bundle:
    """The same bundle, its quality another."""
    quality = Quality(rows=tuple(QualityRow(name=name, r2=r2) for name, r2 in rows))
    return replace(bundle, manifest=replace(bundle.manifest, quality=quality))


@pytest.mark.parametrize(
    ("rows", "rates", "said"),
    [
        ([("flat", 1.0), ("closed form", 0.9801)], CLOSE, "is 0.9801, at least 0.98"),
        ([("flat", 1.0), ("closed form", 0.97)], FULL, "is 0.9700, not at least 0.98"),
        ([("flat", 1.0), ("closed form", 0.9), ("distilled", 0.99)], CLOSE, "is 0.9900"),
        ([("flat", 1.0), ("distilled", 0.5), ("random initialisation", 0.99)], FULL, "is 0.5000"),
        ([("flat", 1.0), ("distilled", 0.99), ("fine-tuned", None)], CLOSE, "is 0.9900"),
        ([("flat", 1.0)], FULL, "is unknown"),
        ([], FULL, "is unknown"),
    ],
)
def test_rates_follow_the_agreement(
    bundle_path: Path, rows: list[tuple[str, float | None]], rates: tuple[float, float], said: str
) -> None:
    bundle = with_rows(open_bundle(bundle_path), *rows)
    config, line = choose_rates(TrainingConfig(seed=3), bundle)
    assert (config.dense_lr, config.table_lr, config.seed) == (*rates, 3)
    assert said in line and f"{rates[1]:g} of tables" in line


@pytest.mark.parametrize("given", [{"dense_lr": 5e-4}, {"table_lr": 0.02}, {"table_lr": 0.1}])
def test_rates_that_are_given_stay(bundle_path: Path, given: dict[str, float]) -> None:
    """Even if they are the defaults: somebody who writes them means them."""
    bundle = with_rows(open_bundle(bundle_path), ("flat", 1.0), ("exact", 1.0))
    asked = TrainingConfig(**given)
    config, line = choose_rates(asked, bundle)
    assert config == asked and line.endswith("as given")


def test_the_recipe_says_and_records_them(
    bundle_path: Path, clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same"
    convert_quickly(bundle_path.parent / "ckpt.pt", same, tower_module="passthrough")
    common = ["--data", str(clicks), "--max-steps", "2"]
    for name, bundle, rates in (("a", same, CLOSE), ("b", bundle_path, FULL)):
        main([*common, "--bundle", str(bundle), "--out", str(tmp_path / name)])
        assert f"learning rates: {rates[1]:g} of tables" in capsys.readouterr().out
        record = open_bundle(tmp_path / name).manifest.initialisation.finetune
        assert record is not None
        assert (record.settings["dense_lr"], record.settings["table_lr"]) == rates
