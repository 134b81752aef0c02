"""Quality survives conversion: the closed form against the flat model, and against baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmt_convert.conversion.initialisation import initialise, ridge
from dmt_convert.conversion.initialisation.dot import second_moments
from dmt_convert.model import TowerModuleSpec, module_spec
from support.models import build_flat, build_sample, split_towers
from support.specs import build_spec

KINDS = ["dot", "cat", "projection", "dcn"]


def _module(flat, dim, **sizes):
    if flat.interaction.kind == "dcn":
        return module_spec(flat, "auto", num_towers=2, dim=dim)
    return TowerModuleSpec(kind="dlrm", dim=dim, **({"c": 1, "p": 0} | sizes))


def _r2(flat, model, sample):
    with torch.no_grad():
        a, b = flat(sample.batch).double(), model(sample.batch).double()
    assert torch.isfinite(b).all()
    if float((a - a.mean()).square().sum()) == 0:
        return 1.0 if torch.allclose(a, b, atol=1e-4) else -np.inf
    return float(1 - (a - b).square().sum() / (a - a.mean()).square().sum())


def _convert(flat, spec, sample):
    model, notes = initialise(flat, spec, sample, method="closed-form")
    assert notes
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", [1, 2, 5])
def test_full_width_gives_the_flat_model(kind, towers):
    """D = N and c = 1 lose nothing; what is left are float32 sums in another order, and for dcn
    the ridge (1e-6 of the variance) of the regression onto coordinates that are all there."""
    flat = build_flat(build_spec(kind=kind))
    spec = split_towers(flat.spec, towers, _module(flat.spec, 8))
    model = _convert(flat, spec, build_sample(flat, 800))
    held = build_sample(flat, 300, seed=1, multi=True)
    with torch.no_grad():
        a, b = flat(held.batch), model(held.batch)
    assert float((a - b).abs().max()) < 2e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "floor"),
    [
        ("dot", {}, 0.8),
        ("dot", {"p": 2}, 0.8),
        ("dot", {"c": 2}, 0.8),
        ("dot", {"c": 0, "p": 4}, 0.4),
        ("cat", {}, 0.9),
        ("cat", {"p": 2}, 0.9),
        ("cat", {"c": 0, "p": 4}, 0.8),
        ("projection", {}, 0.98),
        ("dcn", {}, 0.8),
    ],
)
def test_compression_keeps_what_random_starts_lose(kind, sizes, floor):
    flat = build_flat(build_spec(kind=kind, rows=200))
    spec = split_towers(flat.spec, 2, _module(flat.spec, 4, **sizes))
    model = _convert(flat, spec, build_sample(flat, 2000))
    held = build_sample(flat, 1000, seed=1)
    found = _r2(flat, model, held)
    drawn, _ = initialise(flat, spec, None, method="random", seed=3)
    assert found > floor
    assert 1 - found < 0.5 * (1 - _r2(flat, drawn, held))


@pytest.mark.parametrize("kind", KINDS)
def test_more_width_costs_less(kind):
    flat = build_flat(build_spec(kind=kind, rows=200))
    held = build_sample(flat, 1000, seed=1)
    found = [
        _r2(
            flat,
            _convert(
                flat, split_towers(flat.spec, 2, _module(flat.spec, d)), build_sample(flat, 2000)
            ),
            held,
        )
        for d in (1, 3, 6)
    ]
    assert found[0] < found[1] < found[2]


def _two_couples():
    """over_arch reads <f0, f1> and <f2, f3> alone, and the couples live in different planes."""
    flat = build_flat(build_spec(kind="dot", dims=(8, 8, 8, 8), rows=200, dense_dim=8))
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    weight = flat.over_arch[0].weight
    kept = torch.zeros(weight.shape[1])
    for k, (i, j) in enumerate(zip(*np.triu_indices(5, 1), strict=True)):
        kept[8 + k] = float((i, j) in ((1, 2), (3, 4)))
    with torch.no_grad():
        weight *= kept
        for i, table in enumerate(flat.tables.values()):
            plane = axes[2 * (i // 2) : 2 * (i // 2) + 2]
            drawn = rng.standard_normal((200, 2)) @ plane
            table.weight.copy_(torch.from_numpy(drawn + 0.05 * rng.standard_normal((200, 8))))
    return flat


@pytest.mark.parametrize("width", [2, 3])
def test_dot_keeps_the_pairs_that_count_where_shared_eigenvectors_cannot(width):
    """Baseline: project all vectors by the leading eigenvectors of the mean second moment."""
    flat = _two_couples()
    spec = split_towers(flat.spec, 2, _module(flat.spec, width))
    sample, held = build_sample(flat, 2000), build_sample(flat, 1000, seed=1)
    closed = _r2(flat, _convert(flat, spec, sample), held)
    assert closed > 0.95
    assert 1 - closed < 0.3 * (1 - _baseline(flat, spec, sample, held))


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_dot_beats_shared_eigenvectors_on_any_model(width, seed):
    """All pairs read, all axes unrelated: there shared eigenvectors are nearly the best."""
    flat = build_flat(build_spec(kind="dot", rows=200), seed=seed)
    spec = split_towers(flat.spec, 2, _module(flat.spec, width))
    sample, held = build_sample(flat, 2000), build_sample(flat, 1000, seed=1)
    closed = _r2(flat, _convert(flat, spec, sample), held)
    assert closed > _baseline(flat, spec, sample, held)


def _baseline(flat, spec, sample, held):
    with torch.no_grad():
        dense = flat.dense_arch(torch.from_numpy(sample.batch.dense)).numpy()
    vectors = np.concatenate([dense, sample.pooled], axis=1).reshape(len(dense), -1, 8)
    width = spec.dense_dim
    _, axes = np.linalg.eigh(second_moments(vectors.swapaxes(0, 1)).mean(axis=0))
    shared = torch.from_numpy(axes[:, ::-1][:, :width].copy()).float()
    model, _ = initialise(flat, spec, None, method="random")
    order = [0] + [int(n[1:]) + 1 for tower in spec.towers for n in tower.features]
    left, right = np.triu_indices(len(order), 1)
    column = {}
    for k, (i, j) in enumerate(zip(left, right, strict=True)):
        column[i, j] = column[j, i] = 8 + k
    columns = [*range(8), *(column[order[i], order[j]] for i, j in zip(left, right, strict=True))]
    with torch.no_grad():
        for tower in model.tower_list:
            tower.tower_module.feature_weight.copy_(shared.repeat(len(tower.features), 1))
            tower.tower_module.feature_bias.zero_()
        model.dense_projection.weight.copy_(shared.T)
        model.dense_projection.bias.zero_()
        model.over_arch[0].weight.copy_(flat.over_arch[0].weight[:, columns])
        model.over_arch[0].bias.copy_(flat.over_arch[0].bias)
    return _r2(flat, model, held)


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize(("towers", "c", "p"), [(1, 1, 0), (2, 1, 1), (5, 0, 1)])
def test_dot_columns_are_carried_over_before_any_refit(monkeypatch, self_pairs, towers, c, p):
    """At D = N the carried columns alone are the flat model; no refit mends them."""
    monkeypatch.setattr(ridge, "MAX_INPUTS", 0)
    flat = build_flat(build_spec(kind="dot", self_pairs=self_pairs))
    spec = split_towers(flat.spec, towers, _module(flat.spec, 8, c=c, p=p))
    model = _convert(flat, spec, build_sample(flat, 400))
    assert _r2(flat, model, build_sample(flat, 200, seed=1)) > 1 - 1e-8


@pytest.mark.parametrize("kind", ["dot", "cat"])
def test_swapping_two_projections_is_seen(kind):
    """Saboteur: features read through each other's projections agree with nothing."""
    flat = _two_couples() if kind == "dot" else build_flat(build_spec(kind="cat", rows=200))
    spec = split_towers(flat.spec, 1, _module(flat.spec, 2))
    model = _convert(flat, spec, build_sample(flat, 2000))
    held = build_sample(flat, 500, seed=1)
    before = _r2(flat, model, held)
    with torch.no_grad():
        weight = model.tower_list[0].tower_module.feature_weight
        swapped = weight.clone()
        swapped[0:8], swapped[16:24] = weight[16:24], weight[0:8]
        weight.copy_(swapped)
    assert before > 0.6 and _r2(flat, model, held) < before - 0.3


@pytest.mark.parametrize("kind", ["cat", "dcn"])
def test_mixed_dims(kind):
    flat = build_flat(build_spec(kind=kind, dims=(3, 8, 1, 12), dense_dim=5, rows=100))
    spec = split_towers(flat.spec, 2, _module(flat.spec, 4))
    model = _convert(flat, spec, build_sample(flat, 1500))
    assert _r2(flat, model, build_sample(flat, 500, seed=1)) > 0.6


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("order", ["tril", "triu"])
def test_every_order_of_pairs(self_pairs, order):
    flat = build_flat(build_spec(kind="dot", self_pairs=self_pairs, pair_order=order, rows=100))
    for towers in (1, 2, 5):
        spec = split_towers(flat.spec, towers, _module(flat.spec, 8))
        model = _convert(flat, spec, build_sample(flat, 800))
        assert _r2(flat, model, build_sample(flat, 200, seed=1)) > 1 - 1e-8


def _damage(flat, how):
    with torch.no_grad():
        for i, table in enumerate(flat.tables.values()):
            weight = table.weight
            if how == "rank one":
                weight.copy_(weight[:, :1] @ weight[:1])
            if how == "constant":
                weight.copy_(torch.full_like(weight, 0.1 * i))
            if how == "zero":
                weight.zero_()
        first = flat.over_arch[0]
        if how == "dead" and len(flat.over_arch) > 1:
            first.bias.fill_(-1e3)
        if how == "unread":
            first.weight[:, 3:].zero_()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", ["rank one", "constant", "zero", "dead", "unread", "one row", "one layer", "one feature"]
)
def test_degenerate_models_stay_finite_and_close(kind, how):
    flat = build_flat(
        build_spec(
            kind=kind,
            dims=(8,) if how == "one feature" else (8,) * 5,
            rows=1 if how == "one row" else 40,
            hidden=() if how == "one layer" else (12,),
            dense_dim=8,
        )
    )
    _damage(flat, how)
    sample, held = build_sample(flat, 600, multi=True), build_sample(flat, 300, seed=1, multi=True)
    count = len(flat.spec.features)
    for towers in {1, count}:
        for sizes in ({},) if kind == "dcn" else ({}, {"c": 1, "p": 2}, {"c": 0, "p": 3}):
            spec = split_towers(flat.spec, towers, _module(flat.spec, 5, **sizes))
            model = _convert(flat, spec, sample)
            state = model.state_dict()
            assert all(torch.isfinite(value).all() for value in state.values())
            assert _r2(flat, model, held) > (0.0 if sizes.get("c") == 0 else 0.3), (towers, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_flat_model_is_left_alone_and_the_start_repeats(kind):
    flat = build_flat(build_spec(kind=kind))
    before = {name: value.clone() for name, value in flat.state_dict().items()}
    spec = split_towers(flat.spec, 2, _module(flat.spec, 4))
    sample = build_sample(flat, 400)
    one, two = (_convert(flat, spec, sample).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(value, before[name]) for name, value in flat.state_dict().items())


def test_random_starts_follow_their_seed_and_keep_unchanged_layers():
    flat = build_flat(build_spec(kind="dot"))
    spec = split_towers(flat.spec, 2, _module(flat.spec, 4))
    state = torch.random.get_rng_state()
    one, two, three = (
        initialise(flat, spec, None, method="random", seed=s)[0].state_dict() for s in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["over_arch.0.weight"], three["over_arch.0.weight"])
    for name in ("dense_arch.0.weight", "dense_arch.1.bias", "over_arch.1.weight"):
        assert torch.equal(one[name], flat.state_dict()[name])


def test_the_refit_reports_what_it_reached():
    flat = build_flat(build_spec(kind="cat"))
    spec = split_towers(flat.spec, 2, _module(flat.spec, 4))
    _, notes = initialise(flat, spec, build_sample(flat, 500), method="closed-form")
    reported = [float(part) for part in notes[0].split("R^2 of pre-activations ")[1].split(" -> ")]
    assert 0 < reported[0] <= reported[1] < 1
