"""benchmarks/module_kinds.py: what is added starts at nothing, and is trained."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from dmt_convert.model import DmtModel, DmtSpec, TowerModuleSpec, TowerSpec
from support.paths import REPOSITORY
from support.specs import click_spec


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    yield importlib.import_module("module_kinds")
    for name in ("module_kinds", "frontier", "flat_models", "quality_tables"):
        del sys.modules[name]


def make_start() -> DmtModel:
    torch.manual_seed(0)
    flat, linear = click_spec(), TowerModuleSpec(kind="linear", dim=3)
    names = flat.feature_names
    towers = (names[: len(names) // 2], names[len(names) // 2 :])
    specs = tuple(TowerSpec(features=features, module=linear) for features in towers)
    return DmtModel(DmtSpec(flat=flat, towers=specs)).eval()


@pytest.mark.parametrize("kind", ["linear", "linear, over_arch too", "MLP", "experts", "cross"])
def test_kinds_start_as_the_closed_form_and_learn(
    bench: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "HELD_OUT", 256)
    start = make_start()
    flat = start.spec.flat
    pooled = torch.randn(1024, sum(flat.feature_dims))
    dense = torch.randn(1024, flat.dense_arch.widths[0])
    with torch.no_grad():
        before = start.forward_pooled(dense, pooled)
    model, trained = bench.extend(start, kind)
    with torch.no_grad():
        assert torch.equal(model.forward_pooled(dense, pooled), before)
    rows = (dense, pooled, before + 0.1)
    error = bench.held_out_error(model, rows)
    bench.distil(model, trained, rows, 20, 0)
    assert bench.held_out_error(model, rows) < error
    assert not torch.equal(model.forward_pooled(dense, pooled), before)
    assert torch.equal(start.forward_pooled(dense, pooled), before)
