"""Dense inputs are as large as the optimizer's state says training saw them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmt_convert.checkpoint import open_checkpoint
from dmt_convert.conversion import draw_sample
from dmt_convert.conversion.drawn_inputs import draw_dense, estimate_scale
from dmt_convert.families import infer_model
from support.sampled import flat_info

TABLE = "sparse_arch.embedding_bag_collection.embedding_bags.{}.weight"
LAYER = "dense_arch.model._mlp.0._linear"
ROWS = (300, 40)
CONSTANT, LARGE, RARE = 3.0, 10.0, 0.1
"""Sizes of the dense inputs that a model is trained on: one never varies."""


def _rng(seed=0):
    return np.random.default_rng(seed)


def _linear(draw, name, fan_in, fan_out):
    return {f"{name}.weight": draw(fan_out, fan_in) / fan_in**0.5, f"{name}.bias": draw(fan_out)}


def _parameters(hidden=8, dim=8, num_dense=3):
    """A dot model of two features under TorchRec's names, in its order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {TABLE.format(f"t_f{i}"): draw(rows, dim) for i, rows in enumerate(ROWS)}
    state |= _linear(draw, LAYER, num_dense, hidden)
    state |= _linear(draw, "dense_arch.model._mlp.1._linear", hidden, dim)
    state |= _linear(draw, "over_arch.model.0._mlp.0._linear", dim + 3, 6)
    state |= _linear(draw, "over_arch.model.1", 6, 1)
    return {name: torch.nn.Parameter(value) for name, value in state.items()}


def _logits(p, dense, ids):
    def layer(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    hidden = torch.relu(layer(dense, LAYER))
    bottom = torch.relu(layer(hidden, "dense_arch.model._mlp.1._linear"))
    vectors = [bottom, *(p[TABLE.format(f"t_f{i}")][column] for i, column in enumerate(ids))]
    pairs = [(vectors[i] * vectors[j]).sum(1) for i in range(3) for j in range(i)]
    top = torch.relu(
        layer(torch.cat([bottom, torch.stack(pairs, 1)], 1), "over_arch.model.0._mlp.0._linear")
    )
    return layer(top, "over_arch.model.1").squeeze(1)


def _draw_training_dense(rng, count):
    varying = np.log1p(rng.lognormal(0.5, 1.5, size=count)) * LARGE
    rare = (rng.random(count) < RARE).astype(float)
    return np.stack([np.full(count, CONSTANT), varying, rare], axis=1).astype(np.float32)


def _popularity(rows):
    share = 1 / np.arange(1, rows + 1) ** 1.1
    return _rng(rows).permutation(share / share.sum())


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "started": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=1e-4),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a model with every optimizer; return its checkpoint as inference sees it."""
    torch.set_num_threads(1)
    steps, size = 800, 32
    rng = _rng(1)
    dense = _draw_training_dense(rng, steps * size)
    ids = [rng.choice(rows, size=steps * size, p=_popularity(rows)) for rows in ROWS]
    score = 0.01 * (dense[:, 1] - 15) + (ids[0] % 3 - 1) * 0.4 + 0.5 * dense[:, 2]
    labels = (rng.random(steps * size) < 1 / (1 + np.exp(-score))).astype(np.float32)
    columns = [torch.from_numpy(values).split(size) for values in (dense, *ids, labels)]
    found = {}
    for name, make in OPTIMIZERS.items():
        p = _parameters()
        optimizer = make(p.values())
        for x, first, second, y in zip(*columns, strict=True):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(_logits(p, x, (first, second)), y).backward()
            optimizer.step()
        path = tmp_path_factory.mktemp("trained") / f"{name}.pt"
        model = {key: value.detach() for key, value in p.items()}
        torch.save({"model": model, "optimizer": optimizer.state_dict()}, path)
        found[name] = infer_model(open_checkpoint(path))
    return found


def _true_rms():
    return np.sqrt(np.square(_draw_training_dense(_rng(9), 100_000)).mean(axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sample_looks_like_the_data_that_trained_the_model(trained, optimizer):
    sample = draw_sample(trained[optimizer], rows=16_000)
    assert "how often they were trained" in sample.description
    assert "scaled as in training" in sample.description
    for rows, bag in zip(ROWS, sample.batch.bags, strict=True):
        counts = np.bincount(bag.values, minlength=rows)
        assert np.corrcoef(counts, _popularity(rows))[0, 1] > 0.9
    dense = sample.batch.dense
    assert dense.dtype == np.float32 and dense.shape == (16_000, 3)
    rms = np.sqrt(np.square(dense, dtype=np.float64).mean(axis=0))
    np.testing.assert_allclose(rms, _true_rms(), rtol=0.3)
    np.testing.assert_allclose(dense[:, 0], CONSTANT, rtol=1e-3)
    assert np.ptp(dense[:, 0]) == 0 and (np.ptp(dense[:, 1:], axis=0) > 0.5 * rms[1:]).all()
    assert dense.min() >= 0 and (dense.max(axis=0) <= 1.8 * rms).all()
    again, other = (draw_sample(trained[optimizer], rows=64, seed=seed) for seed in (0, 1))
    assert np.array_equal(again.batch.dense, draw_sample(trained[optimizer], rows=64).batch.dense)
    assert not np.array_equal(again.batch.dense[:, 1], other.batch.dense[:, 1])


def _state(weight, bias, *, name="exp_avg_sq", **options):
    """Accumulators of the first dense layer of the model that `info` writes: 4 units, 2 inputs."""
    state = {}
    for kind, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            state[f"{LAYER}.{kind}"] = {name: torch.as_tensor(np.asarray(values), **options)}
    return state


def _squares(bias, constant, varying):
    return np.stack([np.multiply(bias, constant**2), np.multiply(bias, np.square(varying))], 1)


BIAS = np.array([1e-6, 4e-6, 2e-8, 9e-6])
VARYING = np.array([1.8, 2.0, 2.3, 1.9])
"""What each unit's gradients tell of the second input's size."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["sum", "exp_avg_sq", "momentum1"])
def test_the_median_unit_tells(tmp_path, name, dtype):
    scale = estimate_scale(
        flat_info(tmp_path, state=_state(_squares(BIAS, 5, VARYING), BIAS, name=name, dtype=dtype))
    )
    np.testing.assert_allclose(scale.rms, [5, 1.95], rtol=1e-2)
    assert scale.constant.tolist() == [True, False]


def test_units_that_died_tell_nothing(tmp_path):
    weight, bias = _squares(BIAS, 5, VARYING), BIAS.copy()
    for unit, (dead_bias, dead_weight) in enumerate([(0.0, 0.0), (1e-20, 7.0)]):
        bias[unit], weight[unit] = dead_bias, dead_weight
    scale = estimate_scale(flat_info(tmp_path, state=_state(weight, bias)))
    np.testing.assert_allclose(scale.rms, [5, 2.1], rtol=1e-2)
    assert scale.constant.tolist() == [True, False]


def test_one_unit_tells_the_size_but_not_whether_it_varies(tmp_path):
    bias = np.array([0, 0, 3e-7, 0])
    scale = estimate_scale(flat_info(tmp_path, state=_state(_squares(bias, 5, VARYING), bias)))
    np.testing.assert_allclose(scale.rms, [5, 2.3], rtol=1e-5)
    assert not scale.constant.any()


def test_an_input_that_was_always_zero_stays_zero(tmp_path):
    model = flat_info(tmp_path, state=_state(_squares(BIAS, 0, VARYING), BIAS))
    drawn = draw_dense(model, 100, _rng())
    assert not drawn[:, 0].any() and drawn[:, 1].any()


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (None, BIAS),
        (_squares(BIAS, 5, VARYING), None),
        (_squares(BIAS, 5, VARYING), np.zeros(4)),
        (_squares(BIAS, 5, VARYING), -BIAS),
        (_squares(BIAS, 5, VARYING), [*BIAS[:3], np.nan]),
        (_squares(BIAS, np.nan, VARYING), BIAS),
        (_squares(BIAS, np.inf, VARYING), BIAS),
        (-_squares(BIAS, 5, VARYING), BIAS),
        (_squares(BIAS, 1e20, VARYING), BIAS),
        (_squares(BIAS, 5, VARYING)[:, :1], BIAS),
        (_squares(BIAS, 5, VARYING).T, BIAS),
        (_squares(BIAS, 5, VARYING), BIAS[:3]),
        (_squares(BIAS, 5, VARYING), BIAS[:, None]),
    ],
)
def test_state_that_is_missing_damaged_or_anothers_is_passed_over(tmp_path, weight, bias):
    model = flat_info(tmp_path, state=_state(weight, bias))
    assert estimate_scale(model) is None
    drawn = draw_dense(model, 5000, _rng())
    (tmp_path / "without").mkdir()
    without = flat_info(tmp_path / "without")
    assert np.array_equal(drawn, draw_dense(without, 5000, _rng()))
    assert drawn.shape == (5000, 2) and np.isfinite(drawn).all() and drawn.min() > 0
    assert "dense inputs assumed" in draw_sample(model, rows=8).description


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_adagrad_started_from_is_no_gradient(tmp_path, dtype):
    bias = np.array([0.0, 0.4, 2.0, 0.9])
    state = _state(0.1 + _squares(bias, 5, VARYING), 0.1 + bias, name="sum", dtype=dtype)
    model = flat_info(tmp_path, state=state)
    content = torch.load(model.checkpoint.source)
    group = {"lr": 0.01, "initial_accumulator_value": 0.1, "params": [0]}
    content["optimizer"]["param_groups"] = [group]
    torch.save(content, model.checkpoint.source)
    scale = estimate_scale(infer_model(open_checkpoint(model.checkpoint.source)))
    np.testing.assert_allclose(scale.rms, [5, 2.0], rtol=1e-2)
    assert scale.constant.tolist() == [True, False]
    # too little on top of it is lost in rounding
    content["optimizer"]["state"] = _state(
        0.1 + 1e-6 * _squares(bias, 5, VARYING), 0.1 + 1e-6 * bias, name="sum", dtype=dtype
    )
    torch.save(content, model.checkpoint.source)
    assert estimate_scale(infer_model(open_checkpoint(model.checkpoint.source))) is None
