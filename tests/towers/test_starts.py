"""What the closed forms minimise, against brute force, and degenerate inputs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dmt_convert.conversion.initialisation.dcn import choose_coordinates
from dmt_convert.conversion.initialisation.dot import (
    fit_combinations,
    fit_projections,
    pair_loss,
    second_moments,
    shared_projection,
)
from dmt_convert.conversion.initialisation.first_layer import fit_outputs
from dmt_convert.conversion.initialisation.moments import (
    MatrixMoment,
    RowMoment,
    second_moment,
)


def _vectors(count=4, dim=6, rows=300, seed=0):
    rng = np.random.default_rng(seed)
    scale = 0.6 ** np.arange(dim)
    mixing = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(count)]
    return np.stack(
        [(rng.standard_normal((rows, dim)) + 0.3) * scale @ m for m in mixing], axis=1
    ).astype(np.float32)


def _moments(vectors):
    return second_moments(vectors.swapaxes(0, 1))


def _rebuild(covariance, chosen):
    """B with x - mean ~ B (x_chosen - mean), shape (M, k)."""
    return MatrixMoment(covariance).regressed(np.eye(len(covariance)), chosen)


def _unfolded(pairs, norms, members):
    """Gram matrix of W, unfolded for one tower, as `fit_combinations` takes it."""
    scaled = [matrix[members] * norms[members, None] * norms for matrix in pairs]
    return sum(part @ part.T for part in scaled)


def _importance(count, seed=0):
    matrix = np.random.default_rng(seed).random((count, count))
    matrix = matrix + matrix.T
    np.fill_diagonal(matrix, 0)
    return matrix


def test_second_moments_are_means_of_outer_products():
    vectors = _vectors(rows=7)
    expected = [
        np.mean([np.outer(row[i], row[i]) for row in vectors.astype(float)], axis=0)
        for i in range(4)
    ]
    np.testing.assert_allclose(_moments(vectors), expected, rtol=1e-12)


def test_the_pair_loss_is_the_mean_over_all_pairs_of_rows():
    vectors = _vectors(count=3, dim=4, rows=9)
    weights, rng = _importance(3), np.random.default_rng(1)
    projections = rng.standard_normal((3, 4, 2))
    x = vectors.astype(np.float64)
    brute = 0.0
    for i in range(3):
        for j in range(3):
            errors = [
                (a @ b - (a @ projections[i]) @ (b @ projections[j])) ** 2
                for a in x[:, i]
                for b in x[:, j]
            ]
            brute += weights[i, j] * np.mean(errors)
    assert pair_loss(_moments(vectors), weights, projections) == pytest.approx(brute)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_projections_beat_the_shared_one_they_start_from(width, seed):
    moments, weights = _moments(_vectors(seed=seed)), _importance(4, seed)
    shared = np.repeat(shared_projection(moments, weights)[None, :, :width], 4, axis=0)
    fitted = fit_projections(moments, weights, [width] * 4)
    before = pair_loss(moments, weights, shared)
    after = pair_loss(moments, weights, fitted)
    assert after < 0.95 * before
    # a stationary point: no small change of one projection makes it better
    rng = np.random.default_rng(seed)
    for _ in range(20):
        moved = fitted + 1e-2 * rng.standard_normal(fitted.shape)
        assert pair_loss(moments, weights, moved) > after


def test_projections_are_exact_where_the_vectors_span_no_more():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    vectors = (rng.standard_normal((50, 4, 2)) @ basis.T).astype(np.float32)
    fitted = fit_projections(_moments(vectors), _importance(4), [2] * 4)
    emitted = np.einsum("nvd,vde->nve", vectors, fitted)
    np.testing.assert_allclose(
        np.einsum("nve,nwe->nvw", emitted, emitted)[:, ~np.eye(4, dtype=bool)],
        np.einsum("nvd,nwd->nvw", vectors, vectors)[:, ~np.eye(4, dtype=bool)],
        atol=1e-5,
    )


def test_a_wide_projection_is_the_identity():
    fitted = fit_projections(_moments(_vectors()), _importance(4), [6] * 4)
    assert (fitted == np.eye(6)).all()


@pytest.mark.parametrize(
    ("moments", "weights"),
    [
        (np.zeros((4, 6, 6)), _importance(4)),
        (_moments(_vectors()), np.zeros((4, 4))),
        (_moments(_vectors(count=1)), np.zeros((1, 1))),
        (_moments(_vectors(count=2)), np.array([[0.0, 1e-30], [1e-30, 0.0]])),
        (_moments(_vectors()) * 1e-20, _importance(4)),
        (np.repeat(np.diag([1.0, 0, 0, 0, 0, 0])[None], 4, axis=0), _importance(4)),
        (_moments(_vectors()) * np.array([1, 0, 1, 0])[:, None, None], _importance(4)),
    ],
)
def test_degenerate_moments_give_finite_projections(moments, weights):
    fitted = fit_projections(moments, weights, [2] * len(moments))
    assert fitted.shape == (len(moments), 6, 2) and np.isfinite(fitted).all()
    shared = np.repeat(shared_projection(moments, weights)[None, :, :2], len(moments), axis=0)
    loss = pair_loss(moments, weights, shared)
    assert pair_loss(moments, weights, fitted) <= loss * (1 + 1e-9) + 1e-12 * abs(loss)


def test_combinations_span_what_over_arch_reads():
    """Features whose pairs are all read through one combination are emitted as that one."""
    rng = np.random.default_rng(0)
    true, others = np.array([1.0, -2.0, 0.5]), rng.standard_normal((4, 5))
    pairs = np.zeros((4, 8, 8))
    pairs[:, :3, 3:] = true[:, None] * others[:, None, :]
    pairs += pairs.transpose(0, 2, 1)
    norms = np.array([1.0, 3.0, 0.2, 1, 2, 1, 1, 1])
    combos = fit_combinations(_unfolded(pairs, norms, [0, 1, 2]), norms, np.array([0, 1, 2]), 2)
    assert combos.shape == (2, 8) and not combos[:, 3:].any()
    ratio = combos[0, :3] / true
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize("norms", [np.zeros(4), np.array([0.0, 1, 1, 0])])
def test_combinations_of_zero_vectors_are_finite(norms):
    combos = fit_combinations(np.zeros((2, 2)), norms, np.array([0, 1]), 5)
    assert combos.shape == (5, 4) and np.isfinite(combos).all()
    assert not combos[2:].any()


@pytest.mark.parametrize(("outputs", "dim"), [(3, 8), (12, 8), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_outputs_are_exact_once_the_width_reaches_the_rank(outputs, dim, rank):
    rng = np.random.default_rng(rank)
    block = rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, dim))
    x = (rng.standard_normal((200, dim)) * 0.5 ** np.arange(dim) + 1).astype(np.float32)
    emit, read = fit_outputs(block, x, rank)
    assert emit.shape == (rank, dim) and read.shape == (outputs, rank)
    np.testing.assert_allclose(read @ emit, block, atol=1e-5)
    assert np.std(x @ emit.T, axis=0) == pytest.approx(np.ones(rank), abs=1e-3)
    wide_emit, wide_read = fit_outputs(block, x, rank + 5)
    np.testing.assert_allclose(wide_read @ wide_emit, block, atol=1e-5)
    assert not wide_emit[min(outputs, dim) :].any()


@pytest.mark.parametrize(("outputs", "dim"), [(4, 7), (9, 7)])
def test_no_other_pair_of_maps_loses_less(outputs, dim):
    """The best rank-k approximation of the outputs, by their singular values."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((outputs, dim))
    x = rng.standard_normal((300, dim)).astype(np.float32)
    emit, read = fit_outputs(block, x, 2)
    out = x @ block.T
    out -= out.mean(axis=0)
    values = np.linalg.svd(out, compute_uv=False)
    error = (x - x.mean(axis=0)) @ (block - read @ emit).T
    assert np.square(error).sum() == pytest.approx(np.square(values[2:]).sum(), rel=1e-4)


@pytest.mark.parametrize("x", [np.zeros((20, 5)), np.ones((20, 5)), np.eye(1, 5)])
def test_outputs_of_embeddings_that_do_not_vary_are_finite(x):
    for outputs in (3, 9):
        emit, read = fit_outputs(np.ones((outputs, 5)), x.astype(np.float32), 2)
        assert np.isfinite(emit).all() and np.isfinite(read).all()


def _loss(covariance, sensitivity, chosen):
    inner = covariance[np.ix_(chosen, chosen)]
    rest = covariance - covariance[:, chosen] @ np.linalg.pinv(inner) @ covariance[chosen]
    return float(np.trace(sensitivity @ rest))


@pytest.mark.parametrize("seed", range(8))
def test_coordinates_are_chosen_greedily_and_near_the_best(seed):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((7, 7)) * 0.5 ** np.arange(7)
    covariance = factors @ factors.T
    gradient = rng.standard_normal((7, 3)) * 0.4 ** np.arange(3)
    sensitivity = gradient @ gradient.T
    greedy: list[int] = []
    for _ in range(3):
        rest = [k for k in range(7) if k not in greedy]
        greedy.append(min(rest, key=lambda k: _loss(covariance, sensitivity, [*greedy, k])))
    chosen = choose_coordinates(MatrixMoment(covariance), MatrixMoment(sensitivity), 3)
    assert list(chosen) == sorted(greedy)
    best = min(_loss(covariance, sensitivity, list(subset)) for subset in combinations(range(7), 3))
    nothing = float(np.trace(sensitivity @ covariance))
    assert _loss(covariance, sensitivity, chosen) - best < 0.1 * nothing


@pytest.mark.parametrize(
    "covariance",
    [np.zeros((5, 5)), np.ones((5, 5)), np.diag([1.0, 0, 0, 1, 0]), 1e-20 * np.eye(5)],
)
@pytest.mark.parametrize("sensitivity", [np.zeros((5, 5)), np.eye(5)])
def test_singular_covariances_still_give_distinct_coordinates(covariance, sensitivity):
    for count in range(1, 6):
        chosen = choose_coordinates(MatrixMoment(covariance), MatrixMoment(sensitivity), count)
        assert len(set(chosen.tolist())) == count and (np.diff(chosen) > 0).all()
        back = _rebuild(covariance, chosen)
        assert back.shape == (5, count) and np.isfinite(back).all()
        assert (back[chosen] == np.eye(count)).all()


def test_rebuild_recovers_dependent_coordinates():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2))
    x = np.column_stack([x, x @ [[1.0], [2.0]], x @ [[-1.0], [0.5]]])
    covariance = np.cov(x.T)
    back = _rebuild(covariance, np.array([0, 1]))
    np.testing.assert_allclose(back, [[1, 0], [0, 1], [1, 2], [-1, 0.5]], atol=1e-4)


def test_a_coordinate_that_the_logit_does_not_feel_is_left_out():
    felt = MatrixMoment(np.diag([1.0, 0.0, 2.0, 0.0]))
    chosen = choose_coordinates(MatrixMoment(np.eye(4)), felt, 2)
    assert list(chosen) == [0, 2]


def test_wide_towers_choose_by_a_sketch_nearly_as_well(monkeypatch):
    """Beyond 1,024 coordinates only an estimate of the gains is affordable."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((900, 60)) @ rng.standard_normal((60, 200)) * np.linspace(0.1, 2, 200)
    gradient = rng.standard_normal((900, 20)) @ rng.standard_normal((20, 200))
    covariance, sensitivity = x.T @ x / 900, gradient.T @ gradient / 900

    def loss(chosen):
        left = np.eye(200)
        left[:, chosen] -= _rebuild(covariance, chosen)
        return np.trace(sensitivity @ left @ covariance @ left.T)

    exact = loss(choose_coordinates(MatrixMoment(covariance), MatrixMoment(sensitivity), 30))
    blind = loss(choose_coordinates(MatrixMoment(covariance), MatrixMoment(np.eye(200)), 30))
    monkeypatch.setattr("dmt_convert.conversion.initialisation.moments._EXACT_WIDTH", 100)
    sketched = loss(choose_coordinates(MatrixMoment(covariance), MatrixMoment(sensitivity), 30))
    assert sketched < 1.15 * exact
    assert sketched < 0.9 * blind


def test_few_rows_stand_for_the_matrix_that_they_span():
    """The form for towers that are wider than the sample is long gives the same choice."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 90)) * np.linspace(0.1, 2, 90)).astype(np.float32)
    gradient = rng.standard_normal((40, 90)).astype(np.float32)
    covariance, felt = second_moment(x, centred=True), second_moment(gradient, centred=False)
    assert isinstance(covariance, RowMoment) and isinstance(felt, RowMoment)
    wide = [MatrixMoment(part.rows.T @ part.rows) for part in (covariance, felt)]
    np.testing.assert_allclose(wide[0].matrix, np.cov(x.T, bias=True), atol=1e-6)
    np.testing.assert_allclose(covariance.diagonal, wide[0].diagonal)
    np.testing.assert_allclose(covariance.row(7), wide[0].row(7), atol=1e-12)
    assert covariance.trace_of_product(felt) == pytest.approx(wide[0].trace_of_product(wide[1]))
    chosen = choose_coordinates(covariance, felt, 25)
    np.testing.assert_array_equal(chosen, choose_coordinates(wide[0], wide[1], 25))
    weight = rng.standard_normal((3, 90))
    np.testing.assert_allclose(
        covariance.regressed(weight, chosen), wide[0].regressed(weight, chosen), rtol=1e-6
    )


def test_more_coordinates_than_rows_are_chosen_and_regressed():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 60)).astype(np.float32)
    covariance = second_moment(x, centred=True)
    chosen = choose_coordinates(covariance, second_moment(x, centred=False), 30)
    assert len(set(chosen.tolist())) == 30
    back = covariance.regressed(np.eye(60), chosen)
    centred = x - x.mean(axis=0)
    np.testing.assert_allclose(centred[:, chosen] @ back.T, centred, atol=1e-3)
