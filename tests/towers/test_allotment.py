"""Towers with output dims of their own: what they compute, and which dims are chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmt_convert.conversion.initialisation import allot_dims, initialise, trace_flat
from dmt_convert.conversion.initialisation import allotment as allotment_module
from dmt_convert.model import DmtModel, TowerModuleSpec, alternative_modules, module_spec
from support.models import build_flat, build_sample, split_towers
from support.specs import build_spec


def _with_dims(spec, dims):
    towers = tuple(
        replace(tower, module=replace(tower.module, dim=dim))
        for tower, dim in zip(spec.towers, dims, strict=True)
    )
    return replace(spec, towers=towers)


def _flat(kind, decays=None, rows=200):
    """Features 0 and 1 (one tower) with few dims that matter, the others with many."""
    flat = build_flat(build_spec(kind=kind, dims=(8,) * 4, rows=rows, dense_dim=8), decay=0.95)
    with torch.no_grad():
        for name in ("t0", "t1"):
            axes = torch.linalg.qr(flat.tables[name].weight[:8].T)[0]
            if kind == "dcn":
                axes = torch.eye(8)
            flat.tables[name].weight.copy_(
                (flat.tables[name].weight * 0.5 ** torch.arange(8)) @ axes
            )
    return flat


def _towers(flat, module):
    spec = split_towers(flat.spec, 2, module)
    names = flat.spec.feature_names
    halves = (names[:2], names[2:])
    return replace(
        spec, towers=tuple(replace(t, features=f) for t, f in zip(spec.towers, halves, strict=True))
    )


def _module(flat, dim):
    kind = "dcn" if flat.spec.interaction.kind == "dcn" else "dlrm"
    if kind == "dcn":
        return module_spec(flat.spec, "auto", num_towers=2, dim=dim)
    return TowerModuleSpec(kind="dlrm", c=1, dim=dim)


@pytest.mark.parametrize("c", [1, 2])
def test_narrow_vectors_meet_the_leading_coordinates_of_wide_ones(c):
    """The model with filled-up vectors is the one whose missing coordinates are zeros."""
    flat = build_flat(build_spec(kind="dot"))
    module = TowerModuleSpec(kind="dlrm", c=c, dim=3)
    spec = _with_dims(split_towers(flat.spec, 2, module), (1, 3))
    model = DmtModel(spec, [flat.tables] * 2).eval()
    wide = DmtModel(split_towers(flat.spec, 2, module), [flat.tables] * 2).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in wide.state_dict().items():
        if state[name].shape != value.shape:  # tower 0: every slot of 1 becomes one of 3
            count = c * 3
            filled = torch.zeros(len(state[name]), count)
            filled[:, ::3] = state[name]
            state[name] = filled
    wide.load_state_dict(state)
    sample = build_sample(flat, 50)
    dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
    with torch.no_grad():
        expected = wide.forward_pooled(dense, pooled)
        torch.testing.assert_close(model.forward_pooled(dense, pooled), expected)
        assert spec.tower_widths == (3 * c, 6 * c)  # zeros are not emitted


@pytest.mark.parametrize("kind", ["dot", "cat", "dcn", "projection"])
def test_dims_go_where_they_are_needed_and_no_more_is_emitted(kind):
    flat = _flat(kind)
    sample = build_sample(flat, 2000)
    with torch.no_grad():
        trace = trace_flat(flat, sample)
    spec = _towers(flat, _module(flat, 4))
    found = allot_dims(trace, spec)
    assert sum(found.tower_widths) <= sum(spec.tower_widths)
    few, many = (tower.module.dim for tower in found.towers)
    if kind == "dot":  # a coordinate is worth nothing where the partner lacks it
        assert few <= many
        return
    assert few < 4 < many
    errors = []
    for each in (spec, found):
        model, _ = initialise(flat, each, sample, method="closed-form", trace=trace)
        with torch.no_grad():
            dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
            difference = model.forward_pooled(dense, pooled) - flat.forward_pooled(dense, pooled)
        errors.append(float(difference.square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_dims_lose_less_by_the_same_measure(seed):
    """The greedy choice against all others, for losses in which towers do not meddle."""
    rng = np.random.default_rng(seed)
    steps = [np.sort(rng.random(6))[::-1] for _ in range(3)]
    curves = [np.append(np.cumsum(s[::-1])[::-1], 0.0) for s in steps]

    def loss(dims):
        return float(sum(curve[d] for curve, d in zip(curves, dims, strict=True)))

    found = allotment_module._take_dims(loss, [1, 1, 1], [6, 6, 6], 9)
    best = min(loss(d) for d in itertools.product(range(1, 7), repeat=3) if sum(d) <= 9)
    assert sum(found) == 9 and loss(found) == pytest.approx(best)


def test_what_cannot_be_allotted_stays():
    flat = _flat("dot")
    with torch.no_grad():
        trace = trace_flat(flat, build_sample(flat, 300))
    for spec in (
        _towers(flat, TowerModuleSpec(kind="passthrough")),
        _towers(flat, TowerModuleSpec(kind="dlrm", c=0, p=1, dim=4)),
        split_towers(flat.spec, 1, _module(flat, 4)),
    ):
        assert allot_dims(trace, spec) is spec
    assert allotment_module._take_dims(lambda dims: 0.0, [2, 2], [4, 4], 3) is None


@pytest.mark.parametrize("compression", [2.0, 3.0, 4.0, 8.0])
def test_alternatives_emit_no_more_and_fit_the_towers(compression):
    flat = build_spec(kind="dot", dims=(8,) * 12, dense_dim=8)
    module = module_spec(flat, "auto", num_towers=3, compression=compression)
    found = alternative_modules(flat, module, num_towers=3, compression=compression)
    assert found
    for other in found:
        assert other.c == 0 and 1 <= other.p <= 4 and other.dim <= 8
        assert 12 * 8 / (3 * other.p * other.dim) >= compression
    dcn = build_spec(kind="dcn", dims=(8,) * 12, dense_dim=8)
    assert not alternative_modules(
        dcn, module_spec(dcn, "auto", num_towers=3), num_towers=3, compression=2.0
    )
