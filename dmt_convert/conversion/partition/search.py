"""Search for towers: a first assignment that keeps every bound, then swaps that improve it.

Letters: F features, U units (features that must share a tower), T towers, K kinds of load.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dmt_convert.arrays import BoolArray, Float64Array, FloatArray, IntArray
from dmt_convert.config import PartitionOptions
from dmt_convert.conversion.partition.units import LOAD_KINDS, NO_GROUP, Units
from dmt_convert.errors import PartitionError

logger = logging.getLogger(__name__)

_SLACK: Final = 1e-9
_MAX_PASSES: Final = 15
_MAX_ROUNDS: Final = 40
_ROUND_UNITS: Final = 6000
"""Units that all rounds of a search shuffle and improve in total."""
_LOAD_TRIALS: Final = 6
_MAX_ALLOTMENTS: Final = 60
_EFFORTS: Final = (1, 4, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What every tower must keep to."""

    units: Units
    """What is assigned, and which units must not meet."""
    num_towers: int
    """T."""
    lower: int
    """Smallest number of features in a tower."""
    upper: int
    """Largest number of features in a tower."""
    loads: Float64Array
    """Loads of the units as fractions of a tower's limit, shape (K, U); K is 0 without limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A feasible assignment and the bounds it keeps."""

    bounds: Bounds
    labels: IntArray
    """The one group whose units a tower may hold; `NO_GROUP`: units without a group only. (T,)"""
    assignment: IntArray
    """Tower of every unit, shape (U,)."""


def search_towers(start: Start, pair_UU: Float64Array, *, rng: np.random.Generator) -> IntArray:
    """Lower the summed cost of pairs inside towers, by iterated local search.

    The first round begins at a random assignment. Every further round shuffles a few units of the
    best assignment so far (up to a quarter), which finds better ones than restarting at random.
    All shuffles, swaps and moves keep the bounds.

    Args:
        start: A feasible assignment, from `find_start`.
        pair_UU: Cost of two units in one tower, from `pair_costs`, shape (U, U).
        rng: The only source of randomness.

    Returns:
        Tower of every unit, shape (U,).
    """
    count = len(pair_UU)
    state = TowerState(start.bounds, start.assignment)
    best, best_cost = start.assignment, np.inf
    for number in range(min(_MAX_ROUNDS, max(1, _ROUND_UNITS // count))):
        state.assign(best)
        some = int(rng.integers(2, max(4, count // 4)))
        state.shuffle(count if number == 0 else some, rng=rng)
        cost = state.improve(pair_UU, rng=rng)
        if cost < best_cost - _SLACK:
            best, best_cost = state.assignment, cost
    return best


def pair_costs(units: Units, affinity: FloatArray, *, coherent: bool) -> Float64Array:
    """Cost of every two units in one tower, shape (U, U): minus their affinity, or plus it.

    Affinities count relative to their mean. Otherwise, if sizes may differ, the search would
    only make towers as unequal (or as equal) as the bounds allow.

    Args:
        units: What is assigned.
        affinity: Affinity of the features, shape (F, F).
        coherent: Whether features with high affinity belong together; else they belong apart.
    """
    features = len(affinity)
    pair = affinity.astype(np.float64)
    np.fill_diagonal(pair, 0)
    pair -= pair.sum() / max(1, features * (features - 1))
    if coherent:
        np.negative(pair, out=pair)
    if len(units.weights) != features:
        order = np.argsort(units.unit_of, kind="stable")
        begins = np.concatenate([[0], np.cumsum(units.weights)[:-1]])
        pair = np.add.reduceat(pair[np.ix_(order, order)], begins, axis=0)
        pair = np.add.reduceat(pair, begins, axis=1)
    np.fill_diagonal(pair, 0)
    return np.asarray(pair)


def assign_cyclically(start: Start, *, rng: np.random.Generator) -> IntArray:
    """Put unit k into tower k mod T or, if the bounds forbid that, the next that may take it.

    Returns:
        Tower of every unit, shape (U,).
    """
    towers = start.bounds.num_towers
    turn = np.arange(len(start.assignment))
    cost_TU = (np.arange(towers)[:, None] - turn) % towers
    placement = _Placement(start.bounds, start.labels, cost_TU)
    if not placement.place_all(rng, effort=1):
        return start.assignment
    state = TowerState(start.bounds, placement.assignment)
    return state.assignment if state.repair_loads(4 * towers, rng=rng) else start.assignment


def find_start(
    units: Units, num_towers: int, config: PartitionOptions, *, rng: np.random.Generator
) -> Start:
    """Find bounds that can be kept, and an assignment that keeps them.

    Args:
        units: What is assigned.
        num_towers: T.
        config: Ratios and constraints.
        rng: The only source of randomness.

    Raises:
        PartitionError: No assignment was found; the numbers in the message say why.
    """
    _refuse_impossible(units, num_towers, config)
    features = int(units.weights.sum())
    bounds = Bounds(
        units=units,
        num_towers=num_towers,
        lower=1,
        upper=_size_limit(units, num_towers, config),
        loads=_scale_loads(units, num_towers, config.load_ratio),
    )
    if config.size_ratio > 1:
        start = _find_assignment(bounds, rng)
    else:
        start = _find_tightest(bounds, rng)
    if start is None:
        limit = f" of at most {bounds.upper} features" if config.size_ratio > 1 else ""
        raise PartitionError(
            f"no assignment of {features} features to {num_towers} towers{limit} was found",
            expected="together, apart, groups and sizes that can all be kept at once",
            hint="drop constraints, change --towers or raise the size ratio",
        )
    floor, even = features // num_towers, math.ceil(features / num_towers)
    found = start.bounds
    if config.size_ratio == 1 and (found.upper > even or found.lower < floor):
        logger.warning(
            "shared tables or constraints prevent equal towers: %d to %d features per tower "
            "instead of %d to %d",
            *(found.lower, found.upper, floor, even),
        )
    return _limit_loads(start, config, rng)


def _size_limit(units: Units, num_towers: int, config: PartitionOptions) -> int:
    features = int(units.weights.sum())
    return min(features, math.ceil(config.size_ratio * features / num_towers - _SLACK))


def _refuse_impossible(units: Units, num_towers: int, config: PartitionOptions) -> None:
    features, count = int(units.weights.sum()), len(units.weights)
    largest, groups = int(units.weights.max()), len(set(units.groups.tolist()) - {NO_GROUP})
    limit = _size_limit(units, num_towers, config)
    problems = []
    if num_towers > count:
        parts = "" if count == features else f", which form {count} inseparable units"
        problems.append(f"{num_towers} towers for {features} features{parts}")
    if groups > num_towers:
        problems.append(f"{groups} groups that must not share a tower, for {num_towers} towers")
    for names in config.apart:
        if len(names) > num_towers:
            problems.append(f"{len(names)} features apart, for {num_towers} towers")
    if config.size_ratio > 1 and largest > limit:
        problems.append(f"{largest} inseparable features, for towers of at most {limit}")
    if problems:
        raise PartitionError(
            problems[0] if len(problems) == 1 else "no assignment can meet the request",
            expected=f"between {max(1, groups)} and {count} towers, and constraints that fit them",
            hint="change --towers, or drop constraints",
            details=problems if len(problems) > 1 else (),
        )


def _find_tightest(bounds: Bounds, rng: np.random.Generator) -> Start | None:
    """Find the smallest upper bound that can be kept, then the largest lower bound."""
    features = int(bounds.units.weights.sum())
    floor = features // bounds.num_towers

    def under(upper: int) -> Start | None:
        limited = replace(bounds, upper=upper)
        return _find_assignment(replace(limited, lower=floor), rng) or _find_assignment(
            limited, rng
        )

    found = _find_least(_least_upper(bounds), features, under)
    if found is None or found.bounds.lower == floor:
        return found
    tight = found.bounds
    over = _find_least(
        1 - floor, -1, lambda minus: _find_assignment(replace(tight, lower=-minus), rng)
    )
    return over or found


def _find_least(low: int, high: int, attempt: Callable[[int], Start | None]) -> Start | None:
    """Try `low`, which mostly succeeds, then bisect for the least value that succeeds."""
    found, value = None, low
    while low <= high:
        trial = attempt(value)
        if trial is None:
            low = value + 1
        else:
            found, high = trial, value - 1
        value = (low + high) // 2
    return found


def _least_upper(bounds: Bounds) -> int:
    """A size that the largest tower of any assignment reaches."""
    towers, groups, weights = bounds.num_towers, bounds.units.groups, bounds.units.weights
    upper = max(math.ceil(int(weights.sum()) / towers), int(weights.max()))
    sizes = [int(weights[groups == g].sum()) for g in np.unique(groups[groups != NO_GROUP])]
    while sum(math.ceil(size / upper) for size in sizes) > towers:
        upper += 1
    return upper


def _find_assignment(bounds: Bounds, rng: np.random.Generator) -> Start | None:
    """Look for any assignment within the bounds, loads aside."""
    for labels in _allot_labels(bounds):
        for effort in _EFFORTS:
            placement = _Placement(bounds, labels)
            if placement.place_all(rng, effort=effort):
                return Start(bounds=bounds, labels=labels, assignment=placement.assignment)
            if not placement.hard.any():
                break
    return None


def _allot_labels(bounds: Bounds) -> Iterator[IntArray]:
    """Yield ways to give every tower to one group, shape (T,), the most even first."""
    groups, counts = np.unique(bounds.units.groups, return_counts=True)
    groups, counts = groups[groups != NO_GROUP], counts[groups != NO_GROUP]
    if len(groups) < 2:
        # Nothing must be kept apart, so that every tower may hold everything.
        only = int(groups[0]) if len(groups) else NO_GROUP
        yield np.full(bounds.num_towers, only, dtype=np.int64)
        return
    sizes = [int(bounds.units.weights[bounds.units.groups == g].sum()) for g in groups]
    least = [math.ceil(size / bounds.upper) for size in sizes]
    spare = bounds.num_towers - sum(least)
    if spare < 0:
        return
    first = list(least)
    for _ in range(spare):
        growing = [g for g in range(len(groups)) if first[g] < counts[g]]
        if not growing:
            break
        first[max(growing, key=lambda g: sizes[g] / first[g])] += 1
    labels = np.append(groups, NO_GROUP)
    yield np.repeat(labels, [*first, bounds.num_towers - sum(first)])
    if math.comb(spare + len(groups), len(groups)) > 2000:
        return
    others = [
        [a + b for a, b in zip(least, extra, strict=True)]
        for extra in itertools.product(range(spare + 1), repeat=len(groups))
        if sum(extra) <= spare
    ]
    others.sort(key=lambda shares: sum(abs(a - b) for a, b in zip(shares, first, strict=True)))
    for shares in others[1:_MAX_ALLOTMENTS]:
        yield np.repeat(labels, [*shares, bounds.num_towers - sum(shares)])


class _Placement:
    """Places units into empty towers, within the sizes and constraints (loads aside).

    Hard units (several features, or asked to be apart) are placed first, by depth-first search.
    For the other ones counting tells whether they fit, so they simply follow.
    """

    def __init__(self, bounds: Bounds, labels: IntArray, cost_TU: IntArray | None = None) -> None:
        """Set up empty towers.

        Args:
            bounds: Sizes, and which units must not meet.
            labels: The group of every tower, shape (T,).
            cost_TU: Which towers a unit prefers; of equal ones it prefers the smallest.
        """
        units = bounds.units
        self._bounds, self._units, self._labels = bounds, units, labels
        shape = (bounds.num_towers, len(units.weights))
        self._cost_TU = np.zeros(shape) if cost_TU is None else cost_TU
        self.assignment = np.full(shape[1], -1, dtype=np.int64)
        self._sizes = np.zeros(bounds.num_towers, dtype=np.int64)
        self.hard = units.weights > 1
        if units.apart is not None:
            self.hard |= units.apart.any(axis=1)
        easy = units.groups[~self.hard]
        self._easy_counts = {int(g): int((easy == g).sum()) for g in (*labels, NO_GROUP)}

    def place_all(self, rng: np.random.Generator, *, effort: int) -> bool:
        """Place every unit; return whether that succeeded.

        Args:
            rng: Breaks ties if the effort is above 1.
            effort: Factor on the number of steps that the search may take.
        """
        if not self._place_hard(rng, effort=effort):
            return False
        # Units without a group may go anywhere: they fill what the others leave.
        for group in [*np.unique(self._labels[self._labels != NO_GROUP]), NO_GROUP]:
            easy = np.flatnonzero((self.assignment < 0) & (self._units.groups == group))
            for limit in (self._bounds.lower, self._bounds.upper):
                for unit in easy[self.assignment[easy] < 0]:
                    room = self._takes(int(group)) & (self._sizes < limit)
                    if not room.any():
                        break
                    self._put(unit, int(self._preferred(unit, np.flatnonzero(room))[0]))
        return True

    def _place_hard(self, rng: np.random.Generator, *, effort: int) -> bool:
        degree = np.zeros(len(self.hard), dtype=np.int64)
        if self._units.apart is not None:
            degree = self._units.apart.sum(axis=1)
        order = np.lexsort((degree, self._units.weights))[::-1]
        order = order[self.hard[order]]
        if not len(order):
            return self._easy_fit()
        budget = effort * (4 * len(order) + 2000)
        stack = [iter(self._options(order[0], rng, effort))]
        while stack and budget:
            unit = order[len(stack) - 1]
            self._put(unit, -1)
            tower = next(stack[-1], None)
            if tower is None:
                stack.pop()
                continue
            budget -= 1
            self._put(unit, tower)
            if len(stack) < len(order):
                stack.append(iter(self._options(order[len(stack)], rng, effort)))
            elif self._easy_fit():
                return True
        return False

    def _options(self, unit: int, rng: np.random.Generator, effort: int) -> list[int]:
        """List the towers that may take a hard unit, the preferred first."""
        units = self._units
        allowed = self._takes(int(units.groups[unit]))
        allowed &= self._sizes + units.weights[unit] <= self._bounds.upper
        if units.apart is not None:
            rivals = self.assignment[units.apart[unit]]
            allowed[rivals[rivals >= 0]] = False
        towers = np.flatnonzero(allowed)
        towers = self._preferred(unit, rng.permutation(towers) if effort > 1 else towers)
        # Empty towers of one label are alike: trying one of them is enough.
        empty = self._sizes[towers] == 0
        _, first = np.unique(self._labels[towers[empty]], return_index=True)
        return np.delete(towers, np.delete(np.flatnonzero(empty), first)).tolist()

    def _takes(self, group: int) -> BoolArray:
        """Towers whose label lets in units of a group, shape (T,)."""
        return np.asarray((self._labels == group) | (group == NO_GROUP))

    def _preferred(self, unit: int, towers: IntArray) -> IntArray:
        return towers[np.lexsort((self._sizes[towers], self._cost_TU[towers, unit]))]

    def _put(self, unit: int, tower: int) -> None:
        """Move a unit into a tower, or out of all for -1."""
        old, weight = self.assignment[unit], self._units.weights[unit]
        if old >= 0:
            self._sizes[old] -= weight
        if tower >= 0:
            self._sizes[tower] += weight
        self.assignment[unit] = tower

    def _easy_fit(self) -> bool:
        """Tell whether the easy units still fit: a count, exact because each weighs one."""
        free, room, missing = self._easy_counts[NO_GROUP], 0, 0
        space = self._bounds.upper - self._sizes
        lacking = np.maximum(self._bounds.lower - self._sizes, 0)
        for label in np.unique(self._labels):
            mine = self._labels == label
            own = 0 if label == NO_GROUP else self._easy_counts[int(label)]
            if own > space[mine].sum():
                return False
            room += int(space[mine].sum()) - own
            missing += max(0, int(lacking[mine].sum()) - own)
        return missing <= free <= room


def _scale_loads(units: Units, num_towers: int, ratio: float | None) -> Float64Array:
    """Loads as fractions of a tower's limit; a unit that exceeds it alone counts as 1."""
    if ratio is None:
        return np.zeros((0, len(units.weights)))
    limit = ratio * units.loads.sum(axis=0) / num_towers
    scaled = units.loads / np.where(limit > 0, limit, 1)
    for kind, name in enumerate(LOAD_KINDS):
        alone = np.flatnonzero(scaled[:, kind] > 1)
        if len(alone):
            logger.warning(
                "%s: %d features or inseparable units exceed the limit of %.4g on their own (up "
                "to %.4g); nothing else may add to that load of their towers",
                *(name, len(alone), limit[kind], units.loads[alone, kind].max()),
            )
    return np.minimum(scaled.T, 1.0)


def _limit_loads(start: Start, config: PartitionOptions, rng: np.random.Generator) -> Start:
    """Change a start until it keeps the loads too."""
    bounds, count = start.bounds, len(start.assignment)
    state = TowerState(bounds, start.assignment)
    least, loads = np.array([np.inf]), state.loads
    for _ in range(_LOAD_TRIALS):
        if state.repair_loads(20 * bounds.num_towers + 4 * min(count, 500), rng=rng):
            return replace(start, assignment=state.assignment)
        if state.overload.sum() < least.sum():
            least, loads = state.overload, state.loads
        state.assign(start.assignment)
        state.shuffle(count, rng=rng, loads=False)
    kind = int(loads.max(axis=1).argmax())
    raise PartitionError(
        f"{int((least > 0).sum())} of {bounds.num_towers} towers exceed the load limit in the best "
        f"assignment found: {LOAD_KINDS[kind]} of {loads[kind].max():.3f} times the limit",
        expected=f"at most {config.load_ratio} times the mean load per tower, with "
        f"{bounds.lower} to {bounds.upper} features per tower",
        hint="raise the load ratio or the size ratio, or change --towers",
    )


class TowerState:
    """Units in towers, with the sums that make a change cheap to judge."""

    def __init__(self, bounds: Bounds, assignment: IntArray) -> None:
        self.bounds = bounds
        self._weights = bounds.units.weights
        self._single = bool((self._weights == 1).all())
        self._limited = len(bounds.loads) > 0
        self._conflicts = bounds.units.find_conflicts()
        self.assign(assignment)

    def assign(self, assignment: IntArray) -> None:
        """Begin anew with an assignment, shape (U,)."""
        towers = self.bounds.num_towers
        self.assignment = assignment.copy()
        self.sizes = np.bincount(assignment, self._weights, towers).astype(np.int64)
        self.loads = (
            np.stack([np.bincount(assignment, load, towers) for load in self.bounds.loads])
            if self._limited
            else np.zeros((0, towers))
        )
        if self._conflicts is not None:
            inside = self._inside(np.float32)
            self._met = np.rint(self._conflicts.astype(np.float32) @ inside.T).astype(np.int64)

    def _inside(self, dtype: type[np.floating]) -> FloatArray:
        """1 for every unit in its tower, else 0, shape (T, U)."""
        inside = np.zeros((self.bounds.num_towers, len(self.assignment)), dtype)
        inside[self.assignment, np.arange(len(self.assignment))] = 1
        return inside

    def move(self, unit: int, tower: int) -> None:
        """Put one unit into another tower."""
        old, weight = self.assignment[unit], self._weights[unit]
        self.assignment[unit] = tower
        self.sizes[old] -= weight
        self.sizes[tower] += weight
        self.loads[:, old] -= self.bounds.loads[:, unit]
        self.loads[:, tower] += self.bounds.loads[:, unit]
        if self._conflicts is not None:
            self._met[:, old] -= self._conflicts[unit]
            self._met[:, tower] += self._conflicts[unit]

    def swap(self, unit: int, other: int) -> None:
        """Let two units change places."""
        here, there = int(self.assignment[unit]), int(self.assignment[other])
        self.move(unit, there)
        self.move(other, here)

    def find_moves(self, unit: int, *, loads: bool = True) -> BoolArray:
        """Towers that a unit may move to, shape (T,)."""
        old, weight = self.assignment[unit], self._weights[unit]
        allowed: BoolArray = self.sizes <= self.bounds.upper - weight
        allowed[old] = False
        if self.sizes[old] - weight < self.bounds.lower:
            allowed[:] = False
        if self._conflicts is not None:
            allowed &= self._met[unit] == 0
        if loads and self._limited:
            allowed &= (self.loads + self.bounds.loads[:, unit, None] <= 1 + _SLACK).all(axis=0)
        return allowed

    def find_swaps(self, unit: int, *, loads: bool = True) -> BoolArray:
        """Units that a unit may change places with, shape (U,)."""
        old, new, bounds = self.assignment[unit], self.assignment, self.bounds
        allowed: BoolArray = new != old
        if not self._single:
            change = self._weights[unit] - self._weights
            there, here = self.sizes[new] + change, self.sizes[old] - change
            allowed &= (np.maximum(there, here) <= bounds.upper) & (there >= bounds.lower)
            allowed &= here >= bounds.lower
        if self._conflicts is not None:
            mutual = self._conflicts[unit]
            allowed &= (self._met[unit][new] == mutual) & (self._met[:, old] == mutual)
        if loads and self._limited:
            allowed &= (np.maximum(*self._swapped_loads(unit)) <= 1 + _SLACK).all(axis=0)
        return allowed

    def _swapped_loads(self, unit: int) -> tuple[Float64Array, Float64Array]:
        """Loads of a partner's tower and of the unit's own after a swap, shape (K, U) each."""
        change = self.bounds.loads[:, unit, None] - self.bounds.loads
        here = self.loads[:, self.assignment[unit], None] - change
        return self.loads[:, self.assignment] + change, here

    def shuffle(self, count: int, *, rng: np.random.Generator, loads: bool = True) -> None:
        """Swap `count` random units with random partners, within the bounds."""
        for unit in rng.permutation(len(self.assignment))[:count]:
            partners = np.flatnonzero(self.find_swaps(unit, loads=loads))
            if len(partners):
                self.swap(unit, int(rng.choice(partners)))

    def improve(self, pair_UU: Float64Array, *, rng: np.random.Generator) -> float:
        """Move and swap units, one after the other, as long as that lowers the cost.

        Args:
            pair_UU: Cost of two units in one tower, symmetric, zero diagonal, shape (U, U).
            rng: Order in which units are looked at.

        Returns:
            The summed cost of the pairs that share a tower.
        """
        units = np.arange(len(self.assignment))
        cost_TU = np.asarray(self._inside(np.float64) @ pair_UU)
        current = cost_TU[self.assignment, units]
        for _ in range(_MAX_PASSES):
            improved = False
            for unit in rng.permutation(len(units)):
                gain, other, tower = self._find_gain(unit, cost_TU, current, pair_UU)
                if gain <= _SLACK:
                    continue
                improved = True
                old = int(self.assignment[unit])
                moved = pair_UU[unit]
                if other < 0:
                    self.move(unit, tower)
                else:
                    self.swap(unit, other)
                    moved = moved - pair_UU[other]
                cost_TU[old] -= moved
                cost_TU[tower] += moved
                current = cost_TU[self.assignment, units]
            if not improved:
                break
        return float(current.sum()) / 2

    def _find_gain(
        self, unit: int, cost_TU: Float64Array, current: Float64Array, pair_UU: Float64Array
    ) -> tuple[float, int, int]:
        """Best change of one unit: what it gains, the partner of a swap or -1, the new tower."""
        own = cost_TU[:, unit]
        gains = current[unit] - own[self.assignment] + current - cost_TU[self.assignment[unit]]
        gains += 2 * pair_UU[unit]
        gains[~self.find_swaps(unit)] = -np.inf
        other = int(gains.argmax())
        moves = self.find_moves(unit)
        if moves.any():
            move_gains = np.where(moves, current[unit] - own, -np.inf)
            tower = int(move_gains.argmax())
            if move_gains[tower] >= gains[other]:
                return float(move_gains[tower]), -1, tower
        return float(gains[other]), other, int(self.assignment[other])

    @property
    def overload(self) -> Float64Array:
        """By how much every tower's loads exceed their limits, in total, shape (T,)."""
        return np.asarray(np.maximum(self.loads - 1 - _SLACK, 0).sum(axis=0))

    def repair_loads(self, max_changes: int, *, rng: np.random.Generator) -> bool:
        """Move and swap units until no load exceeds its limit; return whether that succeeded."""
        for _ in range(max_changes):
            overload = self.overload
            if not overload.any():
                return True
            inside = np.flatnonzero(self.assignment == overload.argmax())
            changes = [self._find_relief(u, overload) for u in rng.permutation(inside)[:32]]
            relief, unit, other, tower = max(changes, key=lambda change: change[0])
            if relief <= _SLACK:
                # A dead end: one random swap, then try again.
                unit = int(rng.choice(inside))
                partners = np.flatnonzero(self.find_swaps(unit, loads=False))
                if not len(partners):
                    return False
                other = int(rng.choice(partners))
            if other >= 0:
                self.swap(unit, other)
            else:
                self.move(unit, tower)
        return not self.overload.any()

    def _find_relief(self, unit: int, overload: Float64Array) -> tuple[float, int, int, int]:
        """Best change of one unit: relief, unit, the partner of a swap or -1, the new tower."""
        old, load = self.assignment[unit], self.bounds.loads[:, unit]
        there, here = (np.maximum(x - 1, 0).sum(axis=0) for x in self._swapped_loads(unit))
        relief = overload[self.assignment] + overload[old] - there - here
        relief[~self.find_swaps(unit, loads=False)] = -np.inf
        other = int(relief.argmax())
        there = np.maximum(self.loads + load[:, None] - 1, 0).sum(axis=0)
        left = np.maximum(self.loads[:, old] - load - 1, 0).sum()
        relief_T = overload + overload[old] - there - left
        relief_T[~self.find_moves(unit, loads=False)] = -np.inf
        tower = int(relief_T.argmax())
        if relief_T[tower] > relief[other]:
            return float(relief_T[tower]), unit, -1, tower
        return float(relief[other]), unit, other, int(self.assignment[other])
