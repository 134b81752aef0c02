"""Models whose dense part is a network: as data, as a module, through towers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.spec import (
    FeatureSpec,
    ModelSpec,
    NetworkSpec,
    TableSpec,
    network_model,
)
from dmt_convert.towers import FlatModel, TowerModuleSpec, load_dense, networks
from dmt_convert.towers.initialisation import initialise

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


@pytest.mark.parametrize("num_dense", [4, 0])
def test_passthrough_towers_of_a_network_are_bit_equal(make, num_dense):
    spec = _spec(num_dense)
    flat = make.flat(spec)
    towers = make.towers(spec, 3, TowerModuleSpec(kind="passthrough"))
    model, _ = initialise(flat, towers, None, method="exact")
    batch = make.batch(spec, 33, multi=True)
    assert torch.equal(model(batch), flat(batch))
    with torch.no_grad():
        model.interaction.network.hidden.weight[0, -1] += 1.0
    assert not torch.equal(model(batch), flat(batch))


def test_a_network_gets_every_features_vector_in_order(make):
    spec = _spec()
    flat = make.flat(spec)
    batch = make.batch(spec, 5)
    pooled = [flat.tables(n, b) for n, b in zip(batch.feature_names, batch.bags, strict=True)]
    expected = flat.interaction.network(torch.from_numpy(batch.dense), pooled)
    assert torch.equal(flat(batch), expected)
    *_, (stage, logit) = flat.stages(batch)
    assert stage == "logit" and torch.equal(logit, expected)


def test_loading_keeps_types_and_names_what_does_not_fit(make):
    flat = make.flat(_spec())
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
