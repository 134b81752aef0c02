"""Refitting a linear layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.conversion.initialisation import refit_linear, ridge


def _held_r2(inputs, targets, weight):
    """R^2 on the last quarter with the bias that `refit_linear` documents."""
    cut = int(len(inputs) * 0.75)
    bias = targets.mean(axis=0) - weight @ inputs.mean(axis=0)
    error = np.square(targets - inputs @ weight.T - bias)[cut:].sum()
    return 1 - error / np.square(targets - targets.mean(axis=0))[cut:].sum()


@given(
    rows=st.integers(4, 60),
    width=st.integers(1, 12),
    noise=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_never_worse_than_the_prior(rows, width, noise, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-3, 4, width)
    prior = rng.standard_normal((2, width))
    targets = inputs @ (prior + 0.1 * rng.standard_normal((2, width))).T
    targets += noise * rng.standard_normal(targets.shape)
    fit = refit_linear(inputs, targets, prior)
    assert fit.r2 >= fit.prior_r2
    assert fit.prior_r2 == pytest.approx(_held_r2(inputs, targets, prior), abs=1e-7)
    if not np.isfinite(fit.strength):
        np.testing.assert_allclose(fit.weight, prior, rtol=1e-12)
    np.testing.assert_allclose(
        (inputs @ fit.weight.T + fit.bias).mean(axis=0), targets.mean(axis=0), atol=1e-6
    )


def test_the_chosen_strength_is_solved_on_all_rows():
    """Against the normal equations, written out."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1500, 6)) * [1, 2, 3, 4, 5, 6] + 7
    truth, prior = rng.standard_normal((2, 3, 6))
    targets = inputs @ truth.T + rng.standard_normal((1500, 3))
    fit = refit_linear(inputs, targets, prior)
    assert np.isfinite(fit.strength)
    x = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    y = targets - targets.mean(axis=0)
    start = prior * inputs.std(axis=0)
    system = x.T @ x + fit.strength * 1500 * np.eye(6)
    delta = np.linalg.solve(system, x.T @ (y - x @ start.T)).T
    np.testing.assert_allclose(fit.weight, (start + delta) / inputs.std(axis=0), rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_linear_map_is_recovered(dtype):
    """Up to the weakest ridge, 1e-5 of the variance, and the rounding of float32 inputs."""
    rng = np.random.default_rng(1)
    inputs = (rng.standard_normal((2000, 5)) + 3).astype(dtype)
    truth, bias = rng.standard_normal((4, 5)), rng.standard_normal(4)
    targets = inputs @ truth.T + bias
    fit = refit_linear(inputs, targets, np.zeros((4, 5)))
    assert fit.strength == 1e-5
    np.testing.assert_allclose(fit.weight, truth, atol=1e-4)
    np.testing.assert_allclose(fit.bias, bias, atol=1e-3)
    assert fit.r2 > 1 - 1e-9
    exact = refit_linear(inputs, targets, truth)
    np.testing.assert_allclose(exact.weight, truth, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_and_repeated_columns(value):
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((400, 5)).astype(np.float32)
    inputs[:, 1], inputs[:, 3] = value, inputs[:, 2]
    targets = inputs[:, [2]] * 2 + inputs[:, [0]]
    prior = np.full((1, 5), 0.5)
    fit = refit_linear(inputs, targets, prior)
    assert fit.r2 > 0.999
    assert np.isfinite(fit.weight).all() and np.isfinite(fit.bias).all()
    # a constant tells nothing: its weight stays, equal columns share the change
    np.testing.assert_allclose(fit.weight[0, 1], 0.5, atol=1e-6)
    np.testing.assert_allclose(fit.weight[0, 2], fit.weight[0, 3], atol=1e-3)
    error = inputs @ fit.weight.T + fit.bias - targets
    assert np.abs(error).max() < 0.1 * max(1.0, 1e-6 * abs(value))


def test_more_columns_than_rows():
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 100))
    targets = inputs @ rng.standard_normal((100, 2))
    fit = refit_linear(inputs, targets, np.zeros((2, 100)))
    assert fit.r2 > 0.99 and fit.prior_r2 < 0.01


def test_noise_keeps_the_prior():
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((100, 60)).astype(np.float32)
    prior = rng.standard_normal((2, 60))
    targets = rng.standard_normal((100, 2)) + inputs @ prior.T
    fit = refit_linear(inputs, targets, prior)
    assert fit.strength == np.inf and fit.r2 == fit.prior_r2
    np.testing.assert_allclose(fit.weight, prior)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_hardly_any_rows(rows):
    inputs = np.random.default_rng(5).standard_normal((rows, 4))
    fit = refit_linear(inputs, inputs[:, :2] * 2, np.eye(2, 4))
    assert np.isfinite(fit.weight).all() and np.isfinite([fit.r2, fit.prior_r2]).all()


def test_targets_that_do_not_vary():
    inputs = np.random.default_rng(6).standard_normal((50, 3))
    fit = refit_linear(inputs, np.full((50, 1), 4.0), np.zeros((1, 3)))
    np.testing.assert_allclose(fit.bias, 4)
    assert np.isfinite([fit.r2, fit.prior_r2]).all()


def test_a_layer_that_is_too_wide_keeps_its_prior(monkeypatch):
    monkeypatch.setattr(ridge, "MAX_INPUTS", 3)
    inputs = np.random.default_rng(7).standard_normal((100, 4))
    prior = np.zeros((1, 4))
    targets = inputs[:, :1].copy()
    assert (refit_linear(inputs, targets, prior).weight == 0).all()
    assert refit_linear(inputs[:, :3], targets, prior[:, :3]).r2 > 0.99


def test_blocks_of_rows_do_not_matter(monkeypatch):
    rng = np.random.default_rng(8)
    inputs = rng.standard_normal((333, 7)).astype(np.float32)
    targets = inputs @ rng.standard_normal((7, 2)) + rng.standard_normal((333, 2))
    prior = np.zeros((2, 7))
    whole = refit_linear(inputs, targets, prior)
    monkeypatch.setattr(ridge, "_BLOCK_ROWS", 10)
    blocks = refit_linear(inputs, targets, prior)
    assert blocks.strength == whole.strength
    np.testing.assert_allclose(blocks.weight, whole.weight, rtol=1e-9, atol=1e-12)


def test_rows_are_computed_once_if_they_are_few(monkeypatch):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1500, 7)).astype(np.float32)
    targets, prior = inputs[:, :2] * 2 + inputs[:, 3:5], np.zeros((2, 7))
    asked = []

    def compute(rows):
        asked.append(rows)
        return inputs[rows]

    computed = ridge.ComputedRows(inputs.shape, compute)
    kept = refit_linear(computed.kept_if_small(), targets, prior)
    assert sum(rows.stop - rows.start for rows in asked) == 1500
    monkeypatch.setattr(ridge, "_KEPT_ELEMENTS", 1500 * 7 - 1)
    again = refit_linear(computed.kept_if_small(), targets, prior)
    assert len(asked) > 9 and np.array_equal(kept.weight, again.weight)
