"""Tower modules against explicit loops: what every emitted element is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.model import TowerModuleSpec
from dmt_convert.model.tower_modules import build_tower_module

# float32 sums of a dozen products against float64
TOLERANCE = 2e-6


def _randomise(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return {name: value.numpy().astype(np.float64) for name, value in module.state_dict().items()}


def _loop_dlrm(state, spec, dims, x):
    emitted = []
    starts = np.cumsum([0, *dims])
    for f in range(len(dims) if spec.c else 0):
        for vector in range(spec.c):
            for d in range(spec.dim):
                column = vector * spec.dim + d
                value = state["feature_bias"][f, column]
                for n in range(starts[f], starts[f + 1]):
                    value += x[n] * state["feature_weight"][n, column]
                emitted.append(value)
    for vector in range(spec.p):
        for d in range(spec.dim):
            row = vector * spec.dim + d
            emitted.append(state["tower_bias"][row] + state["tower_weight"][row] @ x)
    return emitted


@pytest.mark.parametrize("dims", [(4, 4, 4), (3, 5, 2), (6,)])
@pytest.mark.parametrize(("c", "p"), [(1, 0), (2, 0), (0, 2), (2, 3)])
def test_dlrm_emits_every_features_vectors_then_the_towers(dims, c, p):
    spec = TowerModuleSpec(kind="dlrm", c=c, p=p, dim=3)
    module = build_tower_module(spec, dims)
    state = _randomise(module)
    x = np.random.default_rng(0).standard_normal((5, sum(dims)))
    found = module(torch.from_numpy(x.astype(np.float32))).detach().numpy()
    assert found.shape == (5, spec.width(dims))
    expected = [_loop_dlrm(state, spec, dims, row) for row in x.astype(np.float32)]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("dims", [(4, 4, 4), (3, 5, 2)])
@pytest.mark.parametrize(("layers", "rank"), [(1, 2), (2, 3), (1, 50)])
def test_dcn_crosses_then_maps(dims, layers, rank):
    spec = TowerModuleSpec(kind="dcn", dim=2, cross_layers=layers, cross_rank=rank)
    module = build_tower_module(spec, dims)
    state = _randomise(module)
    width = sum(dims)
    assert state["cross.0.v"].shape == (min(rank, width), width)
    x0 = np.random.default_rng(0).standard_normal((4, width)).astype(np.float32)
    expected = []
    for row in x0.astype(np.float64):
        x = row.copy()
        for i in range(layers):
            w, v, bias = (state[f"cross.{i}.{kind}"] for kind in ("w", "v", "bias"))
            x = np.array([row[k] * (w[k] @ (v @ x) + bias[k]) + x[k] for k in range(width)])
        expected.append(state["weight"] @ x + state["bias"])
    found = module(torch.from_numpy(x0)).detach().numpy()
    assert found.shape == (4, 2 * len(dims))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())


def test_passthrough_hands_the_embeddings_on():
    x = torch.randn(3, 7)
    module = build_tower_module(TowerModuleSpec(kind="passthrough"), (3, 4))
    assert torch.equal(module(x), x) and not list(module.parameters())
