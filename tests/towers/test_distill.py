"""Distillation: never worse, repeatable, and what it starts from stays."""

from __future__ import annotations

import pytest
import torch

from dmt_convert.conversion.initialisation import distill, initialise
from dmt_convert.model import TowerModuleSpec, module_spec
from support.models import build_flat, build_sample, split_towers
from support.specs import build_spec


def _start(kind="dot", method="closed-form"):
    flat = build_flat(build_spec(kind=kind, rows=100))
    module = (
        module_spec(flat.spec, "auto", num_towers=2, dim=4)
        if kind == "dcn"
        else TowerModuleSpec(kind="dlrm", c=1, dim=4)
    )
    sample = build_sample(flat, 600)
    model, _ = initialise(flat, split_towers(flat.spec, 2, module), sample, method=method)
    return flat, model, sample


def _validation_error(flat, model, sample):
    with torch.no_grad():
        dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
        difference = model.forward_pooled(dense, pooled) - flat.forward_pooled(dense, pooled)
    return float(difference[int(len(dense) * 0.8) :].square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dot", "cat", "dcn", "projection"])
@pytest.mark.parametrize("steps", [1, 120])
def test_never_worse_than_the_start_on_its_validation_rows(kind, steps):
    flat, model, sample = _start(kind)
    before = _validation_error(flat, model, sample)
    found, note = distill(flat, model, sample, steps=steps)
    after = _validation_error(flat, found, sample)
    assert after <= before
    assert (found is model) == ("did not beat" in note) == (after == before)
    assert not found.training


def test_a_damaged_start_is_mended_and_left_as_it_was():
    flat, model, sample = _start()
    with torch.no_grad():
        for parameter in model.tower_list[0].tower_module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    # the tables are frozen, the rest as initialise left it
    assert not any(parameter.requires_grad for parameter in flat.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tables = {name: value.clone() for name, value in flat.state_dict().items()}
    seen = []
    found, note = distill(
        flat, model, sample, steps=200, on_step=lambda done, total: seen.append((done, total))
    )
    error = _validation_error(flat, model, sample)
    assert _validation_error(flat, found, sample) < 0.3 * error
    assert seen == [(50, 200), (100, 200), (150, 200), (200, 200)]
    assert note.startswith("distilled")
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert all(p.requires_grad == (".tables." not in n) for n, p in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, tables[name]) for name, value in flat.state_dict().items())


def test_the_seed_decides():
    flat, model, sample = _start(method="random")
    one, two, three = (
        distill(flat, model, sample, steps=60, seed=seed)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["over_arch.0.weight"], three["over_arch.0.weight"])


def test_the_distilled_model_still_takes_batches():
    flat, model, sample = _start(method="random")
    found, _ = distill(flat, model, sample, steps=60)
    dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
    torch.testing.assert_close(found(sample.batch), found.forward_pooled(dense, pooled))
