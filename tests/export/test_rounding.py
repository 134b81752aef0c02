"""Limits of the checks: wide enough for rounding, and too narrow for a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.data import Bag, Batch
from dmt_convert.model import DmtModel
from dmt_convert.serving import ExportedModel
from dmt_convert.serving.checks import ATOL, MAX_RTOL, RTOL, _equal, _run
from dmt_convert.serving.rounding import rounding_sizes
from support.bundles import convert_quickly
from support.checkpoints.flat import make_flat

Exporter = Callable[..., ExportedModel]
FIRST, LAST = "over_arch.model.0._mlp.0._linear", "over_arch.model.1"
ROWS = 400


def let_sums_cancel(state: dict[str, Any]) -> None:
    """Let units of the over_arch take each other's large outputs back, up to rounding."""
    weight, bias, last = (state[n] for n in (f"{FIRST}.weight", f"{FIRST}.bias", f"{LAST}.weight"))
    for unit in range(0, 12, 2):
        weight[unit + 1], bias[unit + 1] = 3 * weight[unit], 3 * bias[unit]
        last[0, unit], last[0, unit + 1] = 9, -3
    last[0, 12:] *= 0.3  # what does not cancel


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("cancelling")
    flat = make_flat(folder / "flat.pt", dim=16, edit=let_sums_cancel)
    return convert_quickly(flat, folder / "bundle", rows=512, tower_module="passthrough")


@pytest.fixture
def exported(cancelling: Bundle, export_unchecked: Exporter) -> ExportedModel:
    return export_unchecked(cancelling)


def long_bags(model: DmtModel, ids: int = 100) -> Batch:
    rng = np.random.default_rng(0)
    flat = model.spec.flat
    return Batch(
        dense=rng.standard_normal((ROWS, flat.num_dense)).astype(np.float32),
        feature_names=flat.feature_names,
        bags=tuple(
            Bag(
                values=rng.integers(0, flat.table_of(name).rows, ROWS * ids),
                offsets=np.arange(ROWS + 1, dtype=np.int64) * ids,
            )
            for name in flat.feature_names
        ),
    )


@torch.inference_mode()
def test_sums_that_cancel_are_allowed_their_rounding(
    cancelling: Bundle, exported: ExportedModel
) -> None:
    model = open_bundle_model(cancelling)
    batch = long_bags(model)
    checks = list(_run(exported, model, [_equal(model, batch, "long bags")]))
    assert all(check.passed for check in checks)
    whole = next(check for check in checks if check.part == "whole")
    largest = float(dict(model.stages(batch))["logit"].abs().max())
    assert whole.max_abs_diff is not None and whole.limit is not None
    assert whole.max_abs_diff > ATOL + RTOL * largest  # which alone would have refused it
    assert whole.limit < ATOL + MAX_RTOL * largest


@torch.inference_mode()
@pytest.mark.parametrize("fault", ["a unit", "a bias", "two columns", "a row"])
def test_a_fault_is_seen_where_sums_cancel(
    cancelling: Bundle, exported: ExportedModel, fault: str
) -> None:
    """Each is far smaller than a graph that is put together in a wrong way."""
    model = open_bundle_model(cancelling)
    batch = long_bags(model)
    first, last = model.over_arch
    if fault == "a unit":
        last.weight[0, 14] *= 1.1
    elif fault == "a bias":
        last.bias += 0.02 * dict(model.stages(batch))["logit"].abs().max()
    elif fault == "two columns":
        first.weight[14, [20, 21]] = first.weight[14, [21, 20]]
    else:
        first.weight[[14, 15]] = first.weight[[15, 14]]
    checks = list(_run(exported, model, [_equal(model, batch, "long bags")]))
    failed = {check.part for check in checks if not check.passed}
    assert failed == {"joined", "whole"}


def test_ordinary_models_are_held_to_the_usual_limit(make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle("dlrm")
    with torch.inference_mode():
        model = open_bundle_model(bundle)
        batch = long_bags(model, ids=3)
        sizes, stages = rounding_sizes(model, batch), dict(model.stages(batch))
    for name in ("output of tower 0", "output of tower 1", "logit"):
        assert 0 < sizes[name] < 3 * RTOL * float(stages[name].abs().max())


@torch.inference_mode()
def test_the_model_is_as_it_was_afterwards(cancelling: Bundle, tmp_path: Path) -> None:
    model = open_bundle_model(cancelling)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = rounding_sizes(model, long_bags(model, ids=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sizes == rounding_sizes(model, long_bags(model, ids=2))
