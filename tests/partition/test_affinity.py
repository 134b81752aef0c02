"""Affinities against what a plain loop computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmt_convert.conversion.partition import affinity as affinity_module
from dmt_convert.conversion.partition.affinity import cosine_affinity, weights_affinity
from dmt_convert.errors import ArchitectureError, PartitionError
from dmt_convert.spec import ModelSpec
from support.specs import build_spec


def small_spec(count: int, **options: Any) -> ModelSpec:
    """Tables of four columns, five units behind the interaction."""
    return build_spec(count, **{"dims": 4, "hidden": (5,), **options})


def _samples(dims, rows=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, d)).astype(np.float32) + 0.3 for d in dims]


def _brute_cosine(pooled):
    count = len(pooled)
    result = np.eye(count)
    for i in range(count):
        for j in range(count):
            if i == j:
                continue
            width = min(pooled[i].shape[1], pooled[j].shape[1])
            cosines = []
            for a, b in zip(pooled[i], pooled[j], strict=True):
                norms = np.linalg.norm(a) * np.linalg.norm(b)
                if norms > 0:
                    cosines.append(abs(a[:width] @ b[:width]) / norms)
            result[i, j] = np.mean(cosines) if cosines else 0
    return result


def _scale(use):
    np.fill_diagonal(use, 0)
    use = use / use.max()
    np.fill_diagonal(use, 1)
    return use


def test_cosine_of_unequal_widths_with_empty_bags():
    pooled = _samples([4, 4, 2, 7, 4])
    pooled[1][3:9] = 0
    pooled[4][:] = 0
    found = cosine_affinity(pooled)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _brute_cosine(pooled), atol=1e-6)
    assert (found == found.T).all() and (found.diagonal() == 1).all()
    assert not found[4, :4].any()


def test_cosine_is_the_same_in_blocks_and_chunks(monkeypatch):
    pooled = _samples([4] * 11, rows=9)
    whole = cosine_affinity(pooled)
    monkeypatch.setattr(affinity_module, "_BLOCK", 4)
    monkeypatch.setattr(affinity_module, "_CHUNK_ELEMENTS", 2 * 11 * 4)
    np.testing.assert_allclose(cosine_affinity(pooled), whole, atol=1e-6)


@pytest.mark.parametrize("pooled", [[np.zeros((3, 2)), np.zeros((4, 2))], [np.zeros((0, 2))]])
def test_samples_must_agree_in_rows(pooled):
    with pytest.raises(PartitionError, match="rows"):
        cosine_affinity(pooled)


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("pair_order", ["tril", "triu"])
def test_dot_against_brute_force(self_pairs, pair_order):
    spec = small_spec(4, kind="dot", self_pairs=self_pairs, pair_order=pair_order)
    pooled = _samples([4] * 4)
    weight = np.random.default_rng(1).standard_normal((5, spec.over_arch.widths[0]))
    column = 4
    use = np.zeros((4, 4))
    for i in range(5):
        partners = range(i + 1) if pair_order == "tril" else range(i, 5)
        for j in partners:
            if i == j and not self_pairs:
                continue
            if i and j:
                spread = (pooled[i - 1] * pooled[j - 1]).sum(axis=1).std()
                use[i - 1, j - 1] = use[j - 1, i - 1] = spread * np.linalg.norm(weight[:, column])
            column += 1
    assert column == weight.shape[1]
    found = weights_affinity(spec, {"over_arch.0.weight": weight}, pooled)
    np.testing.assert_allclose(found, _scale(use), atol=1e-5)


@pytest.mark.parametrize("slice_elements", [1 << 25, 4])
def test_dcn_against_the_whole_product(monkeypatch, slice_elements):
    monkeypatch.setattr(affinity_module, "_CHUNK_ELEMENTS", slice_elements)
    dims = [3, 5, 2, 4]
    spec = small_spec(4, kind="dcn", dims=dims, cross_rank=3)
    pooled = _samples(dims)
    rng = np.random.default_rng(2)
    width = sum(spec.input_dims)
    weights = {}
    for layer in range(2):
        weights[f"cross.{layer}.w"] = rng.standard_normal((width, 3)).astype(np.float32)
        weights[f"cross.{layer}.v"] = rng.standard_normal((3, width)).astype(np.float32)
    edges = np.cumsum(spec.input_dims)
    use = np.zeros((4, 4))
    for layer in range(2):
        product = weights[f"cross.{layer}.w"] @ weights[f"cross.{layer}.v"]
        for i in range(4):
            for j in range(4):
                block = product[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
                use[i, j] += np.linalg.norm(block)
    spread = np.array([np.sqrt(e.var(axis=0).mean()) for e in pooled])
    expected = _scale((use + use.T) / 2 * np.outer(spread, spread))
    np.testing.assert_allclose(weights_affinity(spec, weights, pooled), expected, atol=1e-5)


def test_cat_and_projection_against_brute_force():
    pooled = _samples([4] * 3)
    rng = np.random.default_rng(3)
    cat = small_spec(3, kind="cat")
    projection = small_spec(3, kind="projection")
    tensors = {
        "over_arch.0.weight": rng.standard_normal((5, 16)),
        "branch1.0.weight": rng.standard_normal((7, 16)),
        "branch2.0.weight": rng.standard_normal((6, 16)),
    }
    for spec, names in (
        (cat, ["over_arch.0.weight"]),
        (projection, ["branch1.0.weight", "branch2.0.weight"]),
    ):
        use = np.zeros((3, 3))
        for name in names:
            for unit in tensors[name]:
                moved = [(pooled[i] @ unit[4 * i + 4 : 4 * i + 8]).std() for i in range(3)]
                use += np.outer(moved, moved)
        np.testing.assert_allclose(weights_affinity(spec, tensors, pooled), _scale(use), atol=1e-5)


def test_weights_find_the_pair_that_the_model_uses():
    """Saboteur: enlarging one column must make exactly that pair the strongest."""
    spec = small_spec(5, kind="dot")
    pooled = _samples([4] * 5)
    weight = np.ones((5, spec.over_arch.widths[0]))
    triu = list(zip(*np.triu_indices(6, 1), strict=True))
    weight[:, 4 + triu.index((2, 5))] = 100
    found = weights_affinity(spec, {"over_arch.0.weight": weight}, pooled)
    np.fill_diagonal(found, 0)
    assert np.unravel_index(found.argmax(), found.shape) == (1, 4)


def test_spread_survives_a_large_mean():
    spec = small_spec(2, kind="dot")
    rng = np.random.default_rng(0)
    small = [1000 + 0.01 * rng.standard_normal((50, 4)) for _ in range(2)]
    pooled = [e.astype(np.float32) for e in small]
    exact = (pooled[0].astype(float) * pooled[1].astype(float)).sum(axis=1).std()
    np.testing.assert_allclose(affinity_module._dot_spread(pooled)[0, 1], exact, rtol=1e-6)
    assert weights_affinity(spec, {"over_arch.0.weight": np.ones((5, 7))}, pooled)[0, 1] == 1


def test_spread_is_the_same_in_blocks_and_chunks(monkeypatch):
    pooled = _samples([4] * 11, rows=9)
    dots = np.einsum("ind,jnd->ijn", *[np.stack(pooled).astype(float)] * 2)
    whole = affinity_module._dot_spread(pooled)
    np.testing.assert_allclose(whole, dots.std(axis=2), rtol=1e-5)
    monkeypatch.setattr(affinity_module, "_BLOCK", 4)
    monkeypatch.setattr(affinity_module, "_CHUNK_ELEMENTS", 2 * 11 * 4)
    np.testing.assert_allclose(affinity_module._dot_spread(pooled), whole, rtol=1e-5)


def test_spread_of_dots_that_never_change_is_zero():
    """Both embeddings change their sign together."""
    sign = np.where(np.arange(20) % 3, 1, -1).astype(np.float32)[:, None]
    vectors = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert affinity_module._dot_spread([sign * v for v in vectors])[0, 1] < 1e-6


def test_spread_of_huge_and_tiny_embeddings():
    rng = np.random.default_rng(0)
    pooled = [
        rng.standard_normal((20, 4)).astype(np.float32) * np.float32(size)
        for size in (1e37, 1, 1e-30)
    ]
    dots = np.einsum("ind,jnd->ijn", *[np.stack(pooled).astype(float)] * 2)
    np.testing.assert_allclose(affinity_module._dot_spread(pooled), dots.std(axis=2), rtol=1e-4)


def test_an_unused_interaction_gives_zeros():
    spec = small_spec(3, kind="dot")
    weight = np.zeros((5, spec.over_arch.widths[0]))
    found = weights_affinity(spec, {"over_arch.0.weight": weight}, _samples([4] * 3))
    assert (found == np.eye(3)).all()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dot", "over_arch.0.weight"),
        ("cat", "over_arch.0.weight"),
        ("dcn", "cross.0.w"),
        ("projection", "branch1.0.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_refused(kind, name):
    spec = small_spec(3, kind=kind)
    with pytest.raises(ArchitectureError, match=f"{name} is missing"):
        weights_affinity(spec, {}, _samples([4] * 3))
    with pytest.raises(ArchitectureError, match=f"{name} has shape"):
        weights_affinity(spec, {name: np.zeros((1, 1))}, _samples([4] * 3))


def test_samples_of_another_model_are_refused():
    with pytest.raises(PartitionError, match="widths"):
        weights_affinity(small_spec(3, kind="dot"), {}, _samples([4, 4, 5]))
