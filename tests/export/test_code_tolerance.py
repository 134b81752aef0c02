"""What checks of exports allow where a code rounds: either level at an edge, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmt_convert.data import Batch
from dmt_convert.model import DmtModel, DmtSpec, TowerCode, TowerModuleSpec
from dmt_convert.serving.checks import _check, _expected
from dmt_convert.serving.export_manifest import tower_name
from dmt_convert.serving.rounding import without_codes
from support.coded import fit_ranges
from support.models import split_towers
from support.rows import build_batch
from support.specs import click_spec

ROWS = 256
CODES = {
    "int8": TowerCode(precision="int8"),
    "8 and 4 bits": TowerCode(precision="int8", int4=2),
    "bf16": TowerCode(precision="bf16"),
}


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(params=CODES)
def model(request: Any) -> DmtModel:
    """Linear towers that send in a code, with random weights."""
    torch.manual_seed(0)
    spec = split_towers(click_spec(), 2, TowerModuleSpec(kind="linear", dim=4))
    coded = replace(spec.towers[0].module, code=CODES[request.param])
    spec = DmtSpec(flat=spec.flat, towers=tuple(replace(t, module=coded) for t in spec.towers))
    built = DmtModel(spec).eval().requires_grad_(False)
    for t, emitted in enumerate(emitted_by(built, build_batch(spec.flat, ROWS))):
        fit_ranges(built.tower_list[t].tower_module.code, emitted)
    return built


@pytest.fixture
def batch(model: DmtModel) -> Batch:
    return build_batch(model.spec.flat, ROWS, seed=1)


def emitted_by(model: DmtModel, batch: Batch) -> list[torch.Tensor]:
    """What the towers emit before it is rounded."""
    with without_codes(model):
        stages = dict(model.stages(batch))
    return [stages[f"output of tower {t}"] for t in range(len(model.spec.towers))]


def answers(model: DmtModel, batch: Batch, noise: float) -> dict[str, torch.Tensor]:
    """Answers of a runtime whose sums are off by up to `noise` of a tower's limit."""
    towers, _ = _expected(model, batch)
    generator = torch.Generator().manual_seed(3)
    arrived = []
    for right, tower, emitted in zip(
        towers, model.tower_list, emitted_by(model, batch), strict=True
    ):
        drawn = 2 * torch.rand(emitted.shape, generator=generator) - 1
        arrived.append(tower.tower_module.code.round(emitted + noise * right.limit * drawn))
    logits = model.forward_emitted(torch.from_numpy(batch.dense), torch.cat(arrived, dim=1))
    return {**{tower_name(t): value for t, value in enumerate(arrived)}, "logit": logits}


def failed(model: DmtModel, batch: Batch, found: dict[str, torch.Tensor]) -> set[str]:
    towers, logits = _expected(model, batch)
    right = {**{tower_name(t): value for t, value in enumerate(towers)}, "logit": logits}
    runtime: Any = SimpleNamespace(runs_on="")
    checks = [
        _check(runtime, part, "", right[part], lambda value=value: value.numpy())
        for part, value in found.items()
    ]
    return {check.part for check in checks if not check.passed}


def test_another_order_of_sums_passes_although_levels_differ(model: DmtModel, batch: Batch) -> None:
    exact, found = answers(model, batch, 0.0), answers(model, batch, 0.9)
    flipped = [not torch.equal(exact[f"tower_00{t}"], found[f"tower_00{t}"]) for t in range(2)]
    assert any(flipped)  # and by far more than the limit:
    limit = _expected(model, batch)[1].limit
    assert float((exact["logit"] - found["logit"]).abs().max()) > 3 * limit
    assert failed(model, batch, found) == set()


def test_larger_differences_fail(model: DmtModel, batch: Batch) -> None:
    found = answers(model, batch, 200.0)
    assert failed(model, batch, found) == {"tower_000", "tower_001", "logit"}


def test_a_level_that_no_rounding_explains_fails(model: DmtModel, batch: Batch) -> None:
    towers, _ = _expected(model, batch)
    found = answers(model, batch, 0.0)
    right = towers[1]
    away = [(i, j) for i in range(ROWS) for j in range(4) if right.low[i, j] == right.high[i, j]]
    row, column = max(away, key=lambda cell: abs(right.low[cell]))
    code = model.tower_list[1].tower_module.code
    value = found["tower_001"][row, column]
    step = 2.0**-7 * abs(value) if code.spec.precision == "bf16" else code.step[column]
    found["tower_001"][row, column] -= step * torch.sign(value)
    assert failed(model, batch, found) == {"tower_001"}
    arrived = torch.cat([found["tower_000"], found["tower_001"]], dim=1)
    found["logit"] = model.forward_emitted(torch.from_numpy(batch.dense), arrived)
    assert failed(model, batch, found) == {"tower_001", "logit"}


def test_a_step_that_is_a_little_wrong_fails(model: DmtModel, batch: Batch) -> None:
    found = answers(model, batch, 0.0)
    assert failed(model, batch, found) == set()
    for part, value in found.items():
        moved = 1.002 if part != "logit" else 1.0
        found[part] = value * moved
    assert failed(model, batch, found) == {"tower_000", "tower_001"}
