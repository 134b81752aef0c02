"""What every partition keeps to, what it finds, and what is refused."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.config import PartitionConfig
from dmt_convert.conversion.partition import cosine_affinity, partition_features
from dmt_convert.errors import PartitionError
from support.affinities import plant_samples, random_affinity
from support.specs import build_spec

BRIEF = settings(max_examples=40, deadline=None, derandomize=True)
STRATEGIES = ["coherent", "diverse", "round-robin"]


def _indices(spec, partition):
    tower_of = partition.assignment.tower_of
    return np.array([tower_of[name] for name in spec.feature_names])


def _pairs_kept(truth, found):
    truth, found = np.asarray(truth), np.asarray(found)
    same = truth[:, None] == truth[None, :]
    np.fill_diagonal(same, False)
    return float((found[:, None] == found[None, :])[same].mean())


@BRIEF
@given(
    count=st.integers(1, 30),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_sizes_differ_by_at_most_one(count, strategy, seed, data):
    towers = data.draw(st.integers(1, count))
    spec = build_spec(count)
    config = PartitionConfig(towers=towers, partition=strategy, seed=seed)
    partition = partition_features(spec, config, random_affinity(count, seed))
    partition.assignment.check_covers(spec.feature_names)
    sizes = [len(tower) for tower in partition.assignment.towers]
    assert len(sizes) == towers and sum(sizes) == count and min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    again = partition_features(spec, config, random_affinity(count, seed))
    assert again.assignment == partition.assignment


@BRIEF
@given(
    count=st.integers(4, 24),
    ratio=st.floats(1.0, 3.0),
    strategy=st.sampled_from(STRATEGIES),
    data=st.data(),
)
def test_size_ratio_bounds_every_tower(count, ratio, strategy, data):
    towers = data.draw(st.integers(2, count // 2))
    config = PartitionConfig(towers=towers, partition=strategy, size_ratio=ratio)
    partition = partition_features(build_spec(count), config, random_affinity(count))
    assert len(partition.assignment.towers) == towers
    assert max(map(len, partition.assignment.towers)) <= math.ceil(ratio * count / towers)


@st.composite
def _requests(draw):
    count = draw(st.integers(4, 9))
    towers = draw(st.integers(1, 4))
    names = [f"f{i}" for i in range(count)]
    some = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True).map(tuple)
    together = tuple(draw(st.lists(some, max_size=2)))
    apart = tuple(draw(st.lists(some, max_size=2)))
    labels = draw(st.lists(st.sampled_from([None, "u", "v"]), min_size=count, max_size=count))
    groups = tuple(
        (g, tuple(n for n, x in zip(names, labels, strict=True) if x == g))
        for g in ("u", "v")
        if g in labels
    )
    shared = {1: 0} if draw(st.booleans()) else {}
    return count, towers, together, apart, groups, shared


def _keeps(found, count, towers, together, apart, groups, shared):
    at = {f"f{i}": found[i] for i in range(count)}
    group_of = {name: g for g, names in groups for name in names}
    return (
        len(set(found)) == towers
        and all(len({at[n] for n in names}) == 1 for names in together)
        and all(len({at[n] for n in names}) == len(names) for names in apart)
        and all(found[i] == found[j] for i, j in shared.items())
        and all(
            at[a] != at[b]
            for a, b in itertools.combinations(group_of, 2)
            if group_of[a] != group_of[b]
        )
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(request=_requests(), strategy=st.sampled_from(STRATEGIES))
def test_constraints_hold_and_only_the_impossible_is_refused(request, strategy):
    """Against all assignments by brute force: feasibility, and the least largest tower."""
    count, towers, together, apart, groups, shared = request
    spec = build_spec(count, shared=shared)
    config = PartitionConfig(
        towers=towers, partition=strategy, together=together, apart=apart, group=groups
    )
    feasible = [
        found
        for found in itertools.product(range(towers), repeat=min(count, 7))
        if count <= 7 and _keeps(found, *request)
    ]
    try:
        partition = partition_features(spec, config, random_affinity(count))
    except PartitionError:
        assert not feasible
        return
    found = _indices(spec, partition)
    assert _keeps(tuple(found), *request)
    if count <= 7:
        least = min(max(np.bincount(f)) for f in feasible)
        assert max(np.bincount(found)) == least
        greatest = max(min(np.bincount(f)) for f in feasible if max(np.bincount(f)) == least)
        assert min(np.bincount(found)) == greatest


@pytest.mark.slow
@BRIEF
@given(seed=st.integers(0, 1000), ratio=st.sampled_from([1.3, 1.6]))
def test_load_ratio_bounds_every_load(seed, ratio):
    rng = np.random.default_rng(seed)
    rows = (10 ** rng.uniform(2, 3, size=24)).astype(int).tolist()
    spec = build_spec(24, rows=rows)
    config = PartitionConfig(towers=4, size_ratio=1.5, load_ratio=ratio)
    loads = partition_features(spec, config, random_affinity(24, seed)).loads
    table = np.array([[x.table_bytes, x.lookups, x.emitted_bytes] for x in loads], dtype=float)
    assert (table <= ratio * table.mean(axis=0) * (1 + 1e-6)).all()


def test_without_a_load_ratio_loads_may_be_uneven():
    """The bound does something: the same request without it breaks it."""
    truth = [0] * 6 + [1] * 6
    spec = build_spec(12, rows=[1000] * 6 + [10] * 6)
    affinity = cosine_affinity(plant_samples(truth))

    def most(ratio):
        config = PartitionConfig(towers=2, load_ratio=ratio)
        loads = [x.table_bytes for x in partition_features(spec, config, affinity).loads]
        return max(loads) / np.mean(loads)

    assert most(None) > 1.9
    assert most(1.2) <= 1.2


def test_a_feature_that_exceeds_the_load_bound_alone(caplog):
    spec = build_spec(9, rows=[100_000] + [10] * 8)
    config = PartitionConfig(towers=3, size_ratio=1.4, load_ratio=1.5)
    with caplog.at_level(logging.WARNING):
        partition = partition_features(spec, config, random_affinity(9))
    assert ("f0",) in partition.assignment.towers
    assert "table bytes: 1 feature" in caplog.text


def test_an_impossible_load_bound_is_refused_with_numbers():
    spec = build_spec(6, rows=[1000, 1000, 1000, 10, 10, 10])
    config = PartitionConfig(towers=2, load_ratio=1.1)
    with pytest.raises(PartitionError, match=r"table bytes of 1\.\d+ times the limit"):
        partition_features(spec, config, random_affinity(6))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "towers"), [(24, 4), (26, 13), (64, 16), (1200, 24)])
def test_planted_groups_are_recovered(count, towers):
    truth = np.random.default_rng(1).permutation(np.arange(count) % towers)
    spec = build_spec(count)
    affinity = cosine_affinity(plant_samples(truth.tolist(), noise=1.2, dim=24))
    inside = affinity[truth[:, None] == truth[None, :]]
    assert np.median(inside[inside < 1]) < 0.5  # far from a clean block matrix
    config = PartitionConfig(towers=towers)
    found = partition_features(spec, config, affinity)
    assert _pairs_kept(truth, _indices(spec, found)) > 0.95
    assert found.within_affinity > 1.5 * found.between_affinity
    naive = partition_features(
        spec, PartitionConfig(towers=towers, partition="round-robin"), affinity
    )
    assert _pairs_kept(truth, _indices(spec, naive)) < 0.5
    diverse = partition_features(
        spec, PartitionConfig(towers=towers, partition="diverse"), affinity
    )
    assert _pairs_kept(truth, _indices(spec, diverse)) < 0.05 + max(0, 6 / towers - 1)
    assert diverse.within_affinity < diverse.between_affinity


def test_unequal_groups_are_recovered_where_sizes_may_differ():
    truth = [0] * 10 + [1] * 3 + [2] * 5
    affinity = cosine_affinity(plant_samples(truth, noise=1.0))
    config = PartitionConfig(towers=3, size_ratio=2.0)
    spec = build_spec(18)
    assert _pairs_kept(truth, _indices(spec, partition_features(spec, config, affinity))) == 1


@BRIEF
@given(seed=st.integers(0, 1000))
def test_the_order_of_features_does_not_matter(seed):
    truth = np.arange(20) % 4
    order = np.random.default_rng(seed).permutation(20)
    affinity = cosine_affinity(plant_samples(truth.tolist(), noise=1.0))
    spec = build_spec([f"f{i}" for i in order])
    found = partition_features(spec, PartitionConfig(towers=4), affinity[np.ix_(order, order)])
    assert _pairs_kept(truth[order], _indices(spec, found)) == 1


def test_round_robin_takes_turns_and_honours_units():
    spec = build_spec(7)
    config = PartitionConfig(towers=3, partition="round-robin")
    partition = partition_features(spec, config)
    assert partition.assignment.towers == (("f0", "f3", "f6"), ("f1", "f4"), ("f2", "f5"))
    assert partition.within_affinity is None
    shared = build_spec(7, shared={6: 1})
    towers = partition_features(shared, config).assignment.tower_of
    assert towers["f6"] == towers["f1"]


def test_towers_are_in_canonical_order():
    spec = build_spec(17)
    towers = partition_features(
        spec, PartitionConfig(towers=5), random_affinity(17)
    ).assignment.towers
    index = {name: i for i, name in enumerate(spec.feature_names)}
    numbers = [[index[name] for name in tower] for tower in towers]
    assert numbers == sorted(sorted(tower) for tower in numbers)


def test_loads_count_shared_tables_once_and_know_lookups():
    spec = build_spec(4, shared={3: 0}, rows=[10, 20, 30, 0], dims=[4, 4, 8, 4])
    config = PartitionConfig(towers=1, partition="round-robin")
    (load,) = partition_features(spec, config, lookups={"f1": 20.0}).loads
    assert (load.features, load.table_bytes) == (4, 4 * (10 * 4 + 20 * 4 + 30 * 8))
    assert (load.lookups, load.emitted_bytes) == (23.0, 4 * (4 + 4 + 8 + 4))


def test_sizes_that_units_forbid_are_relaxed_and_logged(caplog):
    together = (("f0", "f1", "f2"), ("f3", "f4", "f5"), ("f6", "f7", "f8"))
    config = PartitionConfig(towers=2, together=together)
    with caplog.at_level(logging.WARNING):
        partition = partition_features(build_spec(9), config, random_affinity(9))
    assert sorted(map(len, partition.assignment.towers)) == [3, 6]
    assert "3 to 6 features per tower instead of 4 to 5" in caplog.text


def test_user_and_item_groups_of_unlike_size():
    users = tuple(f"f{i}" for i in range(3))
    items = tuple(f"f{i}" for i in range(3, 23))
    config = PartitionConfig(towers=4, group=(("user", users), ("item", items)))
    partition = partition_features(build_spec(23), config, random_affinity(23))
    assert sorted(map(len, partition.assignment.towers)) == [3, 6, 7, 7]
    assert users in partition.assignment.towers


def test_thousands_of_grouped_features():
    users = tuple(f"f{i}" for i in range(100))
    items = tuple(f"f{i}" for i in range(100, 1500))
    config = PartitionConfig(
        towers=2, partition="round-robin", group=(("user", users), ("item", items))
    )
    towers = partition_features(build_spec(1500), config).assignment.towers
    assert set(towers) == {users, items}


@pytest.mark.parametrize("strategy", ["coherent", "diverse"])
@pytest.mark.parametrize(("count", "towers"), [(8, 2), (7, 3), (8, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_balanced_towers_is_found(count, towers, strategy, seed):
    affinity = random_affinity(count, seed).astype(np.float64)
    mean = (affinity.sum() - count) / (count * (count - 1))
    sign = 1 if strategy == "coherent" else -1
    gain = sign * (affinity - mean)

    def inside(found):
        found = np.asarray(found)
        return float(np.triu(gain * (found[:, None] == found), 1).sum())

    limits = {count // towers, -(-count // towers)}
    best = max(
        inside(found)
        for found in itertools.product(range(towers), repeat=count)
        if set(np.bincount(found, minlength=towers)) <= limits
    )
    spec = build_spec(count)
    config = PartitionConfig(towers=towers, partition=strategy)
    partition = partition_features(spec, config, random_affinity(count, seed))
    assert inside(_indices(spec, partition)) == pytest.approx(best)
