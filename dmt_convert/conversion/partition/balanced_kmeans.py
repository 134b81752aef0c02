"""k-means whose clusters are bounded in size and in load, under constraints.

Letters: F features, U units (features that cannot be parted), T towers, d dimensions.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Final

import numpy as np

from dmt_convert.conversion.partition.config import PartitionConfig
from dmt_convert.conversion.partition.feasible_start import (
    Start,
    find_start,
    least_upper,
    place_units,
)
from dmt_convert.conversion.partition.tower_state import Bounds, TowerState
from dmt_convert.conversion.partition.units import LOAD_KINDS, FloatArray, IntArray, Units
from dmt_convert.errors import PartitionError

logger = logging.getLogger(__name__)

_RESTARTS: Final = ((100, 8), (400, 3), (1000, 2))
"""Up to so many units, so many seeded starts; beyond, one has to do."""
_LARGE: Final = 1000
"""Units beyond which passes are counted."""
_ITERATIONS: Final = 15
_LOAD_TRIALS: Final = 6


def plan_bounds(
    units: Units, num_towers: int, config: PartitionConfig, *, rng: np.random.Generator
) -> Start:
    """Find bounds on the towers that can be kept, and an assignment that keeps them.

    Args:
        units: What is assigned.
        num_towers: T.
        config: Ratios and constraints.
        rng: Source of everything random.

    Raises:
        PartitionError: No assignment was found for the request; the numbers say why.
    """
    _refuse_impossible(units, num_towers, config)
    features = int(units.weights.sum())
    even = math.ceil(features / num_towers)
    bounds = Bounds(
        num_towers=num_towers,
        lower=1,
        upper=min(features, math.ceil(config.size_ratio * features / num_towers - 1e-9)),
        weights=units.weights,
        groups=units.groups,
        apart=units.apart,
        loads=_scale_loads(units, num_towers, config.load_ratio),
    )
    if config.size_ratio > 1:
        start = find_start(bounds, rng=rng)
    else:
        start = _find_tightest(bounds, rng)
    if start is None:
        raise PartitionError(
            f"no assignment of {features} features ({len(units.weights)} units that cannot be "
            f"parted, the largest of {units.weights.max()}) to {num_towers} towers of at most "
            f"{bounds.upper if config.size_ratio > 1 else features} features was found",
            expected="together, apart, groups and sizes that can be kept at once",
            hint="ask for fewer constraints, other --towers or a larger size ratio",
        )
    if config.size_ratio == 1 and (
        start.bounds.upper > even or start.bounds.lower < features // num_towers
    ):
        logger.warning(
            "features that cannot be parted or must not meet keep towers from equal sizes: "
            "%d to %d features per tower, where %d / %d gives %d to %d",
            *(start.bounds.lower, start.bounds.upper, features, num_towers),
            *(features // num_towers, even),
        )
    return start if bounds.loads is None else _bound_loads(start, units, config, rng)


def _find_tightest(bounds: Bounds, rng: np.random.Generator) -> Start | None:
    """Least upper bound first, then the greatest lower bound."""
    features = int(bounds.weights.sum())
    floor = features // bounds.num_towers
    low, high = least_upper(bounds), features
    found = None
    # Most requests fit where they could at best: ask there, and near there, before halving.
    step = 0
    while low <= high:
        upper = min(low + step, high)
        trial = None
        for lower in dict.fromkeys((floor, 1)):
            trial = find_start(replace(bounds, lower=lower, upper=upper), rng=rng)
            if trial is not None:
                break
        if trial is not None:
            found, high = trial, upper - 1
            step = (high - low) // 2
        else:
            low, step = upper + 1, 2 * step + 1 if found is None else (high - upper) // 2
    if found is None or found.bounds.lower == floor:
        return found
    low, high = 2, floor - 1
    while low <= high:
        middle = (low + high) // 2
        trial = find_start(replace(found.bounds, lower=middle), rng=rng)
        if trial is None:
            high = middle - 1
        else:
            found, low = trial, middle + 1
    return found


def _refuse_impossible(units: Units, num_towers: int, config: PartitionConfig) -> None:
    features, count = int(units.weights.sum()), len(units.weights)
    problems = []
    if num_towers > count:
        parts = "" if count == features else f", which form {count} units that cannot be parted"
        problems.append(f"{num_towers} towers for {features} features{parts}")
    groups = len(set(units.groups[units.groups >= 0].tolist()))
    if groups > num_towers:
        problems.append(f"{groups} groups that never share a tower, for {num_towers} towers")
    for names in config.apart:
        if len(names) > num_towers:
            problems.append(f"{len(names)} features apart, for {num_towers} towers")
    bound = math.ceil(config.size_ratio * features / num_towers - 1e-9)
    if config.size_ratio > 1 and units.weights.max() > bound:
        problems.append(
            f"{units.weights.max()} features that cannot be parted, for towers of at most {bound}"
        )
    if problems:
        raise PartitionError(
            problems[0] if len(problems) == 1 else "no assignment fits the request",
            expected=f"between {max(1, groups)} and {count} towers, and constraints that fit them",
            hint="change --towers, or drop constraints",
            details=problems if len(problems) > 1 else (),
        )


def _scale_loads(units: Units, num_towers: int, ratio: float | None) -> FloatArray | None:
    """Loads as fractions of a tower's bound; what exceeds it alone just fills it."""
    if ratio is None:
        return None
    bound = ratio * units.loads.sum(axis=0) / num_towers
    scaled = units.loads / np.where(bound > 0, bound, 1)
    for kind, name in enumerate(LOAD_KINDS):
        alone = np.flatnonzero(scaled[:, kind] > 1)
        if len(alone):
            logger.warning(
                "%s: %d features (or features that cannot be parted) exceed the bound of %.4g "
                "alone, up to %.4g; their towers are bounded by them alone",
                *(name, len(alone), bound[kind], units.loads[alone, kind].max()),
            )
    return np.minimum(scaled, 1.0)


def _bound_loads(
    start: Start, units: Units, config: PartitionConfig, rng: np.random.Generator
) -> Start:
    least = np.array([np.inf])
    for trial in range(_LOAD_TRIALS):
        noise = rng.random((start.bounds.num_towers, len(units.weights)))
        assignment = place_units(start.bounds, start.labels, noise, rng=rng) if trial else None
        state = TowerState(start.bounds, start.assignment if assignment is None else assignment)
        changes = 20 * start.bounds.num_towers + 4 * min(len(units.weights), 500)
        if state.repair_loads(rng, max_changes=changes):
            return replace(start, assignment=state.assignment)
        if state.overload.sum() < least.sum():
            least, loads = state.overload, state.loads
    kind = int(loads.max(axis=0).argmax())
    raise PartitionError(
        f"{int((least > 0).sum())} of {start.bounds.num_towers} towers exceed the load bound in "
        f"the best assignment found: {LOAD_KINDS[kind]} of {loads[:, kind].max():.3f} times the "
        "bound",
        expected=f"at most {config.load_ratio} times the mean load per tower, with "
        f"{start.bounds.lower} to {start.bounds.upper} features per tower",
        hint="raise the load ratio or the size ratio, or change --towers",
    )


def cluster_units(
    start: Start,
    units: Units,
    points: FloatArray,
    distance: FloatArray,
    *,
    rng: np.random.Generator,
) -> IntArray:
    """Cluster by balanced k-means on the points, then by swaps on the distances themselves.

    k-means in the plane is the paper's. With more towers than a plane has room for, clusters
    overlap there although the distances tell them apart, so the result is improved on the sum
    of distances inside towers, each taken relative to the mean distance (which lets unequal
    towers stay unequal where sizes may differ). Of several seeded starts the best is kept.

    Args:
        start: Bounds that can be kept, from `plan_bounds`.
        units: What is assigned.
        points: Points of the features, shape (F, d).
        distance: Distances of the features, shape (F, F).
        rng: Source of everything random.

    Returns:
        Tower of every unit, shape (U,).

    Source: the DMT paper, "Tower Partitioner"; the improvement on distances is ours.
    """
    large = len(units.weights) > _LARGE
    pair_UU = _pair_units(units, distance)
    centres_U = np.zeros((len(units.weights), points.shape[1]))
    np.add.at(centres_U, units.unit_of, points)
    centres_U /= units.weights[:, None]
    best, best_cost = start.assignment, np.inf
    restarts = next((k for most, k in _RESTARTS if len(units.weights) <= most), 1)
    for restart in range(restarts):
        state = _run_kmeans(start, units, centres_U, use_start=restart == 1, rng=rng, large=large)
        cost_TU = _sum_inside(state.assignment, pair_UU, start.bounds.num_towers)
        state.improve(cost_TU, rng=rng, pair_UU=pair_UU, max_passes=6 if large else 30)
        cost = float(cost_TU[state.assignment, np.arange(len(state.assignment))].sum())
        if cost < best_cost - 1e-9:
            best, best_cost = state.assignment, cost
    return best


def assign_cyclically(start: Start, units: Units, *, rng: np.random.Generator) -> IntArray:
    """Put unit k into tower k mod T, or where the bounds forbid that, the next that may.

    Returns:
        Tower of every unit, shape (U,).
    """
    towers = start.bounds.num_towers
    turn = np.arange(len(units.weights))
    cost_TU = ((np.arange(towers)[:, None] - turn) % towers).astype(np.float64)
    return _start_from(start, cost_TU, rng).assignment


def _run_kmeans(
    start: Start,
    units: Units,
    centres_U: FloatArray,
    *,
    use_start: bool,
    rng: np.random.Generator,
    large: bool,
) -> TowerState:
    means = _seed_means(start, units, centres_U, rng)
    state = TowerState(start.bounds, start.assignment)
    if not use_start:
        state = _start_from(start, _cost_of(means, centres_U, units), rng)
    for _ in range(_ITERATIONS):
        before = state.assignment.copy()
        means = np.zeros_like(means)
        np.add.at(means, state.assignment, centres_U * units.weights[:, None])
        means /= state.sizes[:, None]
        cost_TU = _cost_of(means, centres_U, units)
        state.improve(cost_TU, rng=rng, max_passes=1 if large else 3)
        if (state.assignment == before).all():
            break
    return state


def _start_from(start: Start, cost_TU: FloatArray, rng: np.random.Generator) -> TowerState:
    """Place units by cost where that can be done at once, else improve what is feasible."""
    assignment = place_units(start.bounds, start.labels, cost_TU, rng=rng)
    state = TowerState(start.bounds, start.assignment if assignment is None else assignment)
    if assignment is not None and state.overload.any():
        changes = 4 * start.bounds.num_towers
        if not state.repair_loads(rng, max_changes=changes):
            state = TowerState(start.bounds, start.assignment)
    state.improve(cost_TU, rng=rng, max_passes=1)
    return state


def _seed_means(
    start: Start, units: Units, centres_U: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """k-means++ among the units that a tower's label takes."""
    means = np.zeros((start.bounds.num_towers, centres_U.shape[1]))
    for label in np.unique(start.labels):
        mine = np.flatnonzero(start.labels == label)
        pool = centres_U[units.groups == label] if len(np.unique(start.labels)) > 1 else centres_U
        pool = pool if len(pool) else centres_U
        nearest = np.ones(len(pool))
        for tower in mine:
            # All points taken already: any will do.
            weights = nearest if nearest.sum() > 0 else np.ones(len(pool))
            means[tower] = pool[rng.choice(len(pool), p=weights / weights.sum())]
            away = ((pool - means[tower]) ** 2).sum(axis=1)
            nearest = away if tower == mine[0] else np.minimum(nearest, away)
    return means


def _cost_of(means: FloatArray, centres_U: FloatArray, units: Units) -> FloatArray:
    squares = ((means[:, None, :] - centres_U[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(squares * units.weights)


def _pair_units(units: Units, distance: FloatArray) -> FloatArray:
    """Distances between units, relative to the mean and summed over their features: (U, U)."""
    features = len(distance)
    mean = (distance.sum() - np.trace(distance)) / max(1, features * (features - 1))
    pair = np.asarray(distance, dtype=np.float64) - mean
    if len(units.weights) != features:
        order = np.argsort(units.unit_of, kind="stable")
        begins = np.concatenate([[0], np.cumsum(units.weights)[:-1]])
        pair = np.add.reduceat(pair[np.ix_(order, order)], begins, axis=0)
        pair = np.add.reduceat(pair, begins, axis=1)
    np.fill_diagonal(pair, 0)
    return np.asarray(pair)


def _sum_inside(assignment: IntArray, pair_UU: FloatArray, towers: int) -> FloatArray:
    inside = np.zeros((towers, len(assignment)))
    inside[assignment, np.arange(len(assignment))] = 1
    return np.asarray(inside @ pair_UU)
