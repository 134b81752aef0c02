"""Models whose dense part is a network: as data, as a module, through towers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmt_convert.conversion.initialisation import (
    allot_dims,
    distill,
    initialise,
    restored_start,
    trace_flat,
)
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.model import FlatModel, TowerModuleSpec, load_dense, networks
from dmt_convert.spec import FeatureSpec, ModelSpec, NetworkSpec, TableSpec, network_model
from support.models import build_flat, build_sample, split_towers
from support.rows import build_batch

DIMS = (3, 8, 1, 5)


class Wide(nn.Module):
    """Batch norm, a hidden layer, and an integer buffer."""

    def __init__(self, config, dims, num_dense):
        super().__init__()
        width = num_dense + sum(dims)
        self.norm = nn.BatchNorm1d(width)
        self.hidden = nn.Linear(width, config["hidden"])
        self.last = nn.Linear(config["hidden"], 1)
        self.register_buffer("shift", torch.arange(width))

    def forward(self, dense_BD: Tensor, pooled: list[Tensor]) -> Tensor:
        x = self.norm(torch.cat((dense_BD, *pooled), dim=1) + self.shift)
        return self.last(torch.tanh(self.hidden(x))).squeeze(1)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", {"wide": Wide})


def _spec(num_dense=4, name="wide"):
    return network_model(
        family="test",
        tables=[TableSpec(name=f"t{i}", rows=40, dim=dim) for i, dim in enumerate(DIMS)],
        features=[FeatureSpec(name=f"f{i}", table=f"t{i}") for i in range(len(DIMS))],
        num_dense=num_dense,
        network=NetworkSpec(name=name, config={"hidden": 7}),
    )


def test_a_spec_with_a_network_survives_json():
    spec = _spec()
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert hash(spec) == hash(ModelSpec.from_json(spec.to_json()))
    assert spec.num_dense == 4 and spec.input_dims == (4, *DIMS)


def test_whole_numbers_that_bundles_would_round_are_refused():
    flat = build_flat(_spec())
    arrays = {
        name.removeprefix("interaction."): value.numpy().copy()
        for name, value in flat.state_dict().items()
        if not name.startswith("tables.")
    }
    arrays["network.norm.num_batches_tracked"] += 1 << 40
    arrays["network.shift"][-1] = 1 << 24
    load_dense(flat, arrays)
    arrays["network.shift"][-1] += 1
    with pytest.raises(ArchitectureError, match=r"network\.shift holds whole numbers"):
        load_dense(flat, arrays)


@pytest.mark.parametrize("num_dense", [4, 0])
def test_passthrough_towers_of_a_network_are_bit_equal(num_dense):
    spec = _spec(num_dense)
    flat = build_flat(spec)
    towers = split_towers(spec, 3, TowerModuleSpec(kind="passthrough"))
    model, _ = initialise(flat, towers, None, method="exact")
    batch = build_batch(spec, 33, multi=True)
    assert torch.equal(model(batch), flat(batch))
    with torch.no_grad():
        model.interaction.network.hidden.weight[0, -1] += 1.0
    assert not torch.equal(model(batch), flat(batch))


def test_a_network_gets_every_features_vector_in_order():
    spec = _spec()
    flat = build_flat(spec)
    batch = build_batch(spec, 5)
    pooled = [flat.tables(n, b) for n, b in zip(batch.feature_names, batch.bags, strict=True)]
    expected = flat.interaction.network(torch.from_numpy(batch.dense), pooled)
    assert torch.equal(flat(batch), expected)
    *_, (stage, logit) = flat.stages(batch)
    assert stage == "logit" and torch.equal(logit, expected)


def test_loading_keeps_types_and_names_what_does_not_fit():
    flat = build_flat(_spec())
    arrays = {
        name.removeprefix("interaction."): value.numpy()
        for name, value in flat.state_dict().items()
        if name.startswith("interaction.")
    }
    arrays["network.norm.num_batches_tracked"] = np.array(12)
    other = FlatModel(_spec())
    load_dense(other, arrays)
    network = other.interaction.network
    assert network.norm.num_batches_tracked.dtype == network.shift.dtype == torch.int64
    assert network.norm.num_batches_tracked.shape == () and network.norm.num_batches_tracked == 12
    del arrays["network.hidden.bias"]
    arrays |= {"network.last.weight": np.zeros((2, 7)), "network.more": np.zeros(1)}
    with pytest.raises(ArchitectureError) as caught:
        load_dense(other, arrays)
    assert caught.value.details == (
        "missing: hidden.bias [7]",
        "wrong shape: last.weight [2, 7], expected [1, 7]",
        "extra: more [1]",
    )


def test_an_unknown_network_is_refused():
    with pytest.raises(ConfigError, match="no-such"):
        FlatModel(_spec(name="no-such"))


def _linear(dim):
    return TowerModuleSpec(kind="linear", dim=dim)


def _r2(model, flat, sample):
    dense, pooled = torch.from_numpy(sample.batch.dense), torch.from_numpy(sample.pooled)
    with torch.no_grad():
        expected = flat.forward_pooled(dense, pooled)
        error = model.forward_pooled(dense, pooled) - expected
    return 1 - float(error.square().sum() / (expected - expected.mean()).square().sum())


def _low_rank(spec, rank):
    """A flat model whose network feels `rank` directions of every tower's embeddings."""
    flat = build_flat(spec)
    torch.manual_seed(1)
    with torch.no_grad():
        hidden = flat.interaction.network.hidden.weight
        hidden[:, 4:] = torch.randn(len(hidden), rank) @ torch.randn(rank, sum(DIMS))
    return flat


def test_linear_towers_keep_the_directions_that_the_network_reads():
    """Each of 2 towers of 17 elements is read through 2 directions: D = 2 loses nothing much."""
    spec = _spec()
    flat = _low_rank(spec, 2)
    sample, held = build_sample(flat, 1200), build_sample(flat, 400, seed=1)
    for dim, least in ((2, 0.99), (1, 0.3)):
        towers = split_towers(spec, 2, _linear(dim))
        model, notes = initialise(flat, towers, sample, method="closed-form")
        agreement = _r2(model, flat, held)
        assert least < agreement < 1, notes
        random, _ = initialise(flat, towers, sample, method="random")
        assert _r2(random, flat, held) < agreement - 0.2
    for name, value in flat.interaction.state_dict().items():
        assert torch.equal(model.interaction.state_dict()[name], value)


def test_a_linear_tower_of_full_width_is_exact():
    spec = _spec()
    flat = build_flat(spec)
    towers = split_towers(spec, 1, _linear(sum(DIMS)))
    model, _ = initialise(flat, towers, build_sample(flat, 100), method="closed-form")
    batch = build_batch(spec, 33)
    assert torch.allclose(model(batch), flat(batch), rtol=0, atol=1e-6)  # one product by 1


def test_directions_are_allotted_to_the_towers_that_need_them():
    spec = _spec()
    flat = build_flat(spec)
    with torch.no_grad():  # of tower 1 (f1, f3) the network reads one direction alone
        hidden = flat.interaction.network.hidden.weight
        for columns in (slice(7, 15), slice(16, 21)):
            hidden[:, columns] = 0.0
        hidden[:, 7] = 1.0
    sample = build_sample(flat, 600)
    allotted = allot_dims(trace_flat(flat, sample), split_towers(spec, 2, _linear(2)))
    assert [tower.module.dim for tower in allotted.towers] == [3, 1]


def test_wide_towers_are_solved_in_blocks(monkeypatch):
    spec = _spec()
    flat = _low_rank(spec, 2)
    sample = build_sample(flat, 1200)
    monkeypatch.setattr(restored_start, "_MAX_WIDTH", 5)
    model, _ = initialise(flat, split_towers(spec, 1, _linear(8)), sample, method="closed-form")
    assert _r2(model, flat, build_sample(flat, 400, seed=1)) > 0.98


def test_distillation_leaves_the_network_alone():
    spec = _spec()
    flat = build_flat(spec)
    sample, held = build_sample(flat, 1200), build_sample(flat, 400, seed=1)
    model, _ = initialise(flat, split_towers(spec, 2, _linear(3)), sample, method="closed-form")
    better, _ = distill(flat, model, sample, steps=200)
    assert _r2(better, flat, held) > _r2(model, flat, held)
    for name, value in flat.interaction.state_dict().items():
        assert torch.equal(better.interaction.state_dict()[name], value)
