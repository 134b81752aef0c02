"""The converted model against the flat one, and both against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.conversion.initialisation import initialise
from dmt_convert.data import Batch
from dmt_convert.model import DmtModel, TowerModuleSpec
from support.models import build_flat, split_towers
from support.rows import build_batch
from support.specs import build_spec

KINDS = ["dot", "cat", "dcn", "projection"]
PASS = TowerModuleSpec(kind="passthrough")


def _module(kind):
    if kind == "dcn":
        return TowerModuleSpec(kind="dcn", dim=3, cross_layers=1, cross_rank=2)
    return TowerModuleSpec(kind="dlrm", c=1, p=1, dim=3)


def _naive_pool(table, bag, pooling):
    rows = []
    for begin, end in zip(bag.offsets[:-1], bag.offsets[1:], strict=True):
        total = np.zeros(table.shape[1])
        for i in range(begin, end):
            weight = 1.0 if bag.weights is None else float(bag.weights[i])
            total += weight * table[bag.values[i]]
        if pooling == "mean" and end > begin:
            total /= end - begin
        rows.append(total)
    return np.array(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", range(1, 6))
def test_passthrough_is_bit_equal(kind, towers):
    spec = build_spec(kind=kind)
    flat = build_flat(spec)
    model, _ = initialise(flat, split_towers(spec, towers, PASS), None, method="exact")
    for multi, weighted in ((False, False), (True, False), (True, True)):
        batch = build_batch(spec, 33, multi=multi, weighted=weighted)
        assert torch.equal(model(batch), flat(batch))


@pytest.mark.parametrize("kind", ["cat", "dcn"])
def test_passthrough_is_bit_equal_with_mixed_dims_and_mean_pooling(kind):
    spec = build_spec(kind=kind, dims=(3, 8, 1, 5), pooling="mean", dense_dim=8)
    flat = build_flat(spec)
    model, _ = initialise(flat, split_towers(spec, 3, PASS), None, method="exact")
    batch = build_batch(spec, 40, multi=True)
    assert torch.equal(model(batch), flat(batch))


def test_swapping_two_features_of_a_passthrough_model_shows():
    """Saboteur: the bit-equal test must see a batch whose bags are swapped."""
    spec = build_spec(kind="cat")
    flat = build_flat(spec)
    model, _ = initialise(flat, split_towers(spec, 2, PASS), None, method="exact")
    batch = build_batch(spec, 33)
    swapped = Batch(
        dense=batch.dense,
        feature_names=batch.feature_names,
        bags=(batch.bags[1], batch.bags[0], *batch.bags[2:]),
    )
    assert (model(swapped) - flat(batch)).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_is_what_a_loop_gives(pooling, weighted):
    spec = build_spec(kind="cat", dims=(3, 6), pooling=pooling, dense_dim=8)
    flat = build_flat(spec)
    batch = build_batch(spec, 50, multi=True, weighted=weighted)
    for name, bag in zip(batch.feature_names, batch.bags, strict=True):
        assert (np.diff(bag.offsets) == 0).any()
        table = flat.tables[spec.table_of(name).name].weight.numpy()
        found = flat.tables(name, bag).numpy()
        np.testing.assert_allclose(found, _naive_pool(table, bag, pooling), atol=1e-5)


@pytest.mark.slow
@given(
    kind=st.sampled_from(KINDS),
    towers=st.integers(1, 5),
    multi=st.booleans(),
    passthrough=st.booleans(),
)
@settings(max_examples=25)
def test_the_ways_through_the_model_agree(kind, towers, multi, passthrough):
    spec = split_towers(build_spec(kind=kind), towers, PASS if passthrough else _module(kind))
    flat = build_flat(spec.flat)
    torch.manual_seed(2)
    model = DmtModel(spec, [flat.tables] * towers).eval().requires_grad_(False)
    batch = build_batch(spec.flat, 17, multi=multi)
    bags = dict(zip(batch.feature_names, batch.bags, strict=True))
    pooled = torch.cat([flat.tables(n, bags[n]) for n in spec.flat.feature_names], dim=1)
    own = [tower([bags[name] for name in tower.features]) for tower in model.tower_list]
    emitted = model.emit(pooled)
    assert torch.equal(emitted, torch.cat(own, dim=1))
    assert [part.shape[1] for part in own] == list(spec.tower_widths)
    logits = model(batch)
    assert torch.equal(logits, model.forward_pooled(torch.from_numpy(batch.dense), pooled))
    stages = dict(model.stages(batch))
    assert torch.equal(stages["logit"], logits)
    for t, part in enumerate(own):
        assert torch.equal(stages[f"output of tower {t}"], part)
    for name in spec.flat.feature_names:
        assert torch.equal(stages[f"pooled embedding of {name}"], flat.tables(name, bags[name]))
    assert stages["interaction"].shape[1] == spec.over_arch.widths[0]


@pytest.mark.parametrize("kind", KINDS)
def test_stages_of_the_flat_model_end_in_its_logit(kind):
    flat = build_flat(build_spec(kind=kind, hidden=(5, 4)))
    batch = build_batch(flat.spec, 9, multi=True)
    stages = dict(flat.stages(batch))
    assert list(stages)[-5:] == [
        "dense_arch", "interaction", "over_arch layer 0", "over_arch layer 1", "logit",
    ]  # fmt: skip
    assert torch.equal(stages["logit"], flat(batch))


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("order", ["tril", "triu"])
def test_dot_interaction_is_what_a_loop_gives(self_pairs, order):
    flat = build_flat(build_spec(kind="dot", self_pairs=self_pairs, pair_order=order))
    batch = build_batch(flat.spec, 6)
    stages = {name: value.numpy() for name, value in flat.stages(batch)}
    vectors = [stages["dense_arch"]]
    vectors += [stages[f"pooled embedding of {n}"] for n in flat.spec.feature_names]
    columns = [stages["dense_arch"]]
    for i in range(6):
        for j in range(i + 1) if order == "tril" else range(i, 6):
            if i != j or self_pairs:
                columns.append((vectors[i] * vectors[j]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(stages["interaction"], np.concatenate(columns, 1), atol=1e-5)
