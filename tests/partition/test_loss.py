"""The partition by loss: what it finds, against all partitions and an independent computation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dmt_convert.config import ConvertConfig, PartitionConfig
from dmt_convert.conversion.module_choice import default_strategy, planned_elements
from dmt_convert.conversion.partition import Felt, JointCodes, joint_code, partition_features
from dmt_convert.conversion.partition import loss_search as search_module
from dmt_convert.errors import PartitionError
from dmt_convert.model import TowerModuleSpec
from support.specs import build_spec

DIM = 3


def _felt(count: int, *, seed: int = 0, rows: int = 400, joint: bool = True) -> Felt:
    """Features that share hidden causes, and gradients that share causes of their own."""
    rng = np.random.default_rng(seed)
    causes, feelings = rng.standard_normal((rows, 4)), rng.standard_normal((rows, 3))
    mixed = causes @ rng.standard_normal((4, count * DIM))
    pooled = mixed + rng.standard_normal((rows, count * DIM)) + 0.5
    gradient = feelings @ rng.standard_normal((3, count * DIM))
    gradient += 0.5 * rng.standard_normal((rows, count * DIM))
    return Felt(
        pooled=pooled.astype(np.float32),
        gradient=gradient.astype(np.float32),
        dims=(DIM,) * count,
        joint=joint,
    )


def _direct_loss(felt: Felt, towers, elements: int) -> float:
    """The closed form's loss, from W^1/2 C W^1/2 of the embeddings as they are."""
    spectra = []
    for tower in towers:
        columns = [f * DIM + d for f in tower for d in range(DIM)]
        x, g = (part[:, columns].astype(np.float64) for part in (felt.pooled, felt.gradient))
        x = x - x.mean(axis=0)
        covariance, weight = x.T @ x / len(x), g.T @ g / len(g)
        if not felt.joint:
            covariance *= np.kron(np.eye(len(tower)), np.ones((DIM, DIM)))
        values, axes = np.linalg.eigh(weight)
        root = (axes * np.sqrt(np.maximum(values, 0))) @ axes.T
        spectra.append(np.sort(np.linalg.eigvalsh(root @ covariance @ root))[::-1])
    rest = np.sort(np.concatenate([values[1:] for values in spectra]))[::-1]
    return float(rest[elements - len(towers) :].sum()) / felt.spread


def _indices(spec, partition):
    index = {name: i for i, name in enumerate(spec.feature_names)}
    return [tuple(index[name] for name in tower) for tower in partition.towers]


def _find(felt: Felt, count: int, towers: int, elements: int, **options):
    spec = build_spec(count)
    config = PartitionConfig(towers=towers, partition="loss", **options)
    return spec, partition_features(spec, config, codes=JointCodes(felt, elements))


def _all_losses(felt: Felt, count: int, towers: int, elements: int) -> list[float]:
    limits = {count // towers, -(-count // towers)}
    found = {}
    for chosen in itertools.product(range(towers), repeat=count):
        if set(np.bincount(chosen, minlength=towers)) <= limits:
            groups = frozenset(
                tuple(f for f in range(count) if chosen[f] == t) for t in range(towers)
            )
            found.setdefault(groups, _direct_loss(felt, sorted(groups), elements))
    return sorted(found.values())


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("count", "towers", "elements"), [(6, 2, 5), (7, 3, 6), (8, 2, 9)])
def test_the_best_of_all_towers_is_found(count, towers, elements, joint, monkeypatch):
    monkeypatch.setattr(joint_code, "_UNFELT", 0.0)
    for seed in range(3):
        felt = _felt(count, seed=seed, joint=joint)
        spec, partition = _find(felt, count, towers, elements)
        every = _all_losses(felt, count, towers, elements)
        found = _direct_loss(felt, _indices(spec, partition), elements)
        assert found == pytest.approx(every[0], rel=1e-9)
        assert every[0] < 0.98 * np.mean(every)  # there was something to find
        # the damping of copies moves eigenvalues by 1e-5
        assert partition.lost == pytest.approx(found, rel=1e-4)


def test_pairs_of_copies_share_towers_and_a_wrong_measure_misses_them(monkeypatch):
    felt = _felt(8)
    pooled = felt.pooled.copy()
    rng = np.random.default_rng(1)
    for f in range(4):
        own = rng.standard_normal((len(pooled), DIM)).astype(np.float32)
        turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
        pooled[:, f * DIM : (f + 1) * DIM] = own
        pooled[:, (f + 4) * DIM : (f + 5) * DIM] = own @ turn
    felt = Felt(pooled=pooled, gradient=felt.gradient, dims=felt.dims, joint=True)
    planted = {(f, f + 4) for f in range(4)}
    spec, partition = _find(felt, 8, 4, 12)
    assert set(_indices(spec, partition)) == planted
    assert partition.affinity is not None and partition.affinity[0, 4] > 0.5
    assert partition.within_affinity > 1.5 * partition.between_affinity

    # a saboteur: pairs are measured upside down, and no code may be solved to correct that
    right = JointCodes.savings
    monkeypatch.setattr(JointCodes, "savings", lambda codes: -right(codes))
    monkeypatch.setattr(search_module, "_WORK", 0)
    spec, partition = _find(felt, 8, 4, 12)
    assert not set(_indices(spec, partition)) & planted


def test_exact_losses_correct_what_pairs_say(monkeypatch):
    felt = _felt(8)
    every = _all_losses(felt, 8, 2, 9)
    monkeypatch.setattr(joint_code, "_UNFELT", 0.0)
    right = JointCodes.savings
    monkeypatch.setattr(JointCodes, "savings", lambda codes: -right(codes))
    spec, partition = _find(felt, 8, 2, 9)
    assert _direct_loss(felt, _indices(spec, partition), 9) == pytest.approx(every[0], rel=1e-9)


def test_savings_are_those_of_towers_of_two():
    felt = _felt(5)
    codes = JointCodes(felt, 6)
    price = 0.25 * np.sort(np.concatenate(codes.values))[::-1][5]
    saved = codes.savings()
    for i, j in itertools.combinations(range(5), 2):
        losses = [np.minimum(codes.solve(f), price).sum() for f in ((i,), (j,), (i, j))]
        # of a pair, the damping of copies counts; of single features, it does not
        assert saved[i, j] == pytest.approx(losses[0] + losses[1] - losses[2], rel=1e-4)
    np.testing.assert_allclose(saved, saved.T, rtol=1e-12, atol=1e-12)


def test_savings_and_losses_are_the_same_in_blocks_and_from_rows(monkeypatch):
    felt = _felt(9)
    whole = JointCodes(felt, 8)
    saved, values = whole.savings(), whole.solve([1, 4, 7])
    monkeypatch.setattr(joint_code, "_MATRIX_WIDTH", 0)
    monkeypatch.setattr(joint_code, "_PAIR_BLOCK", 4 * (2 * DIM) ** 2)
    again = JointCodes(felt, 8)
    np.testing.assert_allclose(again.savings(), saved, atol=1e-9)
    np.testing.assert_allclose(again.solve([1, 4, 7]), values, rtol=1e-9)


def test_constraints_hold_and_the_seed_decides():
    felt = _felt(12, seed=2)
    options = {
        "together": (("f0", "f7"),),
        "apart": (("f1", "f2", "f3"),),
        "group": (("user", ("f4", "f5")), ("item", ("f6", "f8"))),
        "size_ratio": 1.5,
        "seed": 5,
    }
    _, partition = _find(felt, 12, 4, 12, **options)
    tower_of = partition.assignment.tower_of
    assert tower_of["f0"] == tower_of["f7"]
    assert len({tower_of[f] for f in ("f1", "f2", "f3")}) == 3
    assert not {tower_of["f4"], tower_of["f5"]} & {tower_of["f6"], tower_of["f8"]}
    assert max(map(len, partition.towers)) <= 5
    assert _find(felt, 12, 4, 12, **options)[1].towers == partition.towers


def test_degenerate_features():
    felt = _felt(6)
    pooled, gradient = felt.pooled.copy(), felt.gradient.copy()
    pooled[:, :DIM] = 2.0  # never varies
    pooled[:, DIM : 2 * DIM] = np.where(pooled[:, DIM : DIM + 1] > 0, 1.0, -1.0)  # two rows
    pooled[:, 3 * DIM : 4 * DIM] = pooled[:, 2 * DIM : 3 * DIM]  # a copy
    gradient[:, 2 * DIM : 3 * DIM] = 0.0  # never felt
    few = slice(0, 5)  # fewer rows than a tower has columns
    felt = Felt(pooled=pooled[few], gradient=gradient[few], dims=felt.dims, joint=True)
    _, partition = _find(felt, 6, 2, 4)
    assert partition.lost is not None and np.isfinite(partition.lost)
    assert sorted(map(len, partition.towers)) == [3, 3]


def test_work_is_bounded_by_what_is_solved(monkeypatch):
    felt = _felt(16)
    monkeypatch.setattr(search_module, "_WORK", 30 * search_module._SOLVE)
    _, partition = _find(felt, 16, 4, 12)
    assert "as many as a search may" in partition.search
    assert int(partition.search.split("(")[1].split()[0]) < 40


def test_what_the_search_says():
    assert "not known what they share" in _find(_felt(6, joint=False), 6, 2, 5)[1].search
    assert "not known" not in _find(_felt(6), 6, 2, 5)[1].search


def test_loss_without_rows_is_refused():
    config = PartitionConfig(towers=2, partition="loss")
    with pytest.raises(PartitionError, match="no sampled rows"):
        partition_features(build_spec(4), config)


def test_loss_is_the_default_where_towers_may_restore():
    spec = build_spec(6, kind="dot")
    linear = TowerModuleSpec(kind="linear", dim=5)
    plain = TowerModuleSpec(kind="dlrm", c=1, dim=2)
    combining = TowerModuleSpec(kind="dlrm", p=1, dim=2)
    assert default_strategy(spec, ()) == default_strategy(spec, (plain, linear)) == "loss"
    assert default_strategy(spec, (plain,)) == "coherent"
    assert default_strategy(spec, (combining,)) == "diverse"


def test_elements_follow_what_is_asked_for():
    spec = build_spec(6, dims=4)
    plain = TowerModuleSpec(kind="dlrm", c=1, dim=2)
    linear = TowerModuleSpec(kind="linear", dim=3)
    assert planned_elements(spec, (plain,), 2) == 12
    assert planned_elements(spec, (plain, linear), 2) == 6
    assert planned_elements(spec, (), 2, 32.0) == 4  # 3 bytes
    assert planned_elements(spec, (TowerModuleSpec(kind="passthrough"),), 2) == 12
    assert ConvertConfig(towers=2, partition="loss").strategy == "loss"
