"""Metrics against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.metrics import area_under_curve, measure_accuracy, measure_agreement, rank

ROWS = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30)


@given(rows=ROWS)
def test_auc_is_the_share_of_pairs_in_order(rows):
    logits = np.array([z for z, _ in rows], dtype=np.float32)
    labels = np.array([y for _, y in rows], dtype=np.float32)
    positive, negative = logits[labels == 1], logits[labels == 0]
    found = measure_accuracy(logits, labels)
    if not len(positive) or not len(negative):
        assert found.auc is None and found.ne is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    expected = wins / (len(positive) * len(negative))
    assert found.auc == pytest.approx(expected)
    assert area_under_curve(logits, labels) == pytest.approx(expected)


@given(rows=ROWS)
def test_log_loss_and_normalised_entropy(rows):
    logits = np.array([z for z, _ in rows], dtype=np.float64)
    labels = np.array([y for _, y in rows], dtype=np.float64)
    chance = 1 / (1 + np.exp(-logits))
    loss = -np.mean(labels * np.log(chance) + (1 - labels) * np.log(1 - chance))
    found = measure_accuracy(logits, labels)
    assert found.log_loss == pytest.approx(loss)
    rate = labels.mean()
    if 0 < rate < 1:
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        assert found.ne == pytest.approx(loss / entropy)


def test_predicting_the_rate_has_a_normalised_entropy_of_one():
    labels = np.array([1, 0, 0, 0], dtype=np.float32)
    found = measure_accuracy(np.full(4, np.log(1 / 3)), labels)
    assert found.ne == pytest.approx(1) and found.auc == 0.5


def test_large_logits_do_not_overflow():
    found = measure_accuracy(np.array([1e4, -1e4, 1e4]), np.array([1.0, 0.0, 0.0]))
    assert found.log_loss == pytest.approx(1e4 / 3)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=25))
def test_ranks_share_their_mean(values):
    array = np.array(values, dtype=np.float64)
    expected = [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]
    assert rank(array).tolist() == expected


@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=25))
def test_agreement_against_its_formulas(pairs):
    a, b = np.array(pairs, dtype=np.float64).T
    found = measure_agreement(a, b)
    assert found.max_abs_diff == np.abs(a - b).max()
    if a.std() > 0:
        expected = 1 - np.square(a - b).sum() / np.square(a - a.mean()).sum()
        assert found.r2 == pytest.approx(expected)
    if a.std() > 0 and b.std() > 0:
        ranks = np.corrcoef(rank(a), rank(b))[0, 1]
        assert found.rank_correlation == pytest.approx(ranks, abs=1e-12)


def test_agreement_at_its_edges():
    constant = np.full(5, 2.0)
    same = measure_agreement(constant, constant)
    assert (same.r2, same.max_abs_diff, same.rank_correlation) == (1, 0, 1)
    assert measure_agreement(constant, constant + 1).r2 == -np.inf
    varying = np.arange(5.0)
    assert measure_agreement(varying, np.full(5, 2.0)).r2 == 0
    assert measure_agreement(varying, constant).rank_correlation == 0
    assert measure_agreement(varying, -varying).rank_correlation == pytest.approx(-1)
    assert measure_agreement(varying, varying**3).rank_correlation == pytest.approx(1)
    assert measure_agreement(varying[:1], varying[:1]).r2 == 1


def test_large_offsets_do_not_cancel():
    a = (1e4 + np.random.default_rng(0).standard_normal(1000) * 1e-2).astype(np.float32)
    assert measure_agreement(a, a).r2 == 1
    assert measure_agreement(a, a[::-1].copy()).r2 < 0
