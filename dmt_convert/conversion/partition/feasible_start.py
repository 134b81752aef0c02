"""A first assignment that keeps to the sizes and the constraints, or the proof of trying.

Units of one feature that nobody asked to be apart are easy: whether they fit can be counted.
The others are placed first, by depth-first search.

Letters: U units, T towers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.conversion.partition.tower_state import Bounds
from dmt_convert.conversion.partition.units import BoolArray, FloatArray, IntArray

_MAX_ALLOTMENTS: Final = 60
_NO_GROUP: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A feasible assignment and what it was found under."""

    bounds: Bounds
    """The bounds it keeps."""
    labels: IntArray
    """The one group whose units a tower may hold, -1 for units of no group only, shape (T,)."""
    assignment: IntArray
    """Tower of every unit, shape (U,)."""


def find_start(bounds: Bounds, *, rng: np.random.Generator) -> Start | None:
    """Look for any assignment within the bounds, loads aside; None where none was found."""
    flat = np.zeros((bounds.num_towers, len(bounds.weights)))
    for labels in _allot_labels(bounds):
        for effort in (1, 4, 16):
            assignment = place_units(bounds, labels, flat, rng=rng, effort=effort)
            if assignment is not None:
                return Start(bounds=bounds, labels=labels, assignment=assignment)
            if not _hard_units(bounds).any():
                break
    return None


def least_upper(bounds: Bounds) -> int:
    """A bound on the largest tower that no assignment can go below."""
    towers, groups, weights = bounds.num_towers, bounds.groups, bounds.weights
    upper = max(math.ceil(int(weights.sum()) / towers), int(weights.max()))
    sizes = [int(weights[groups == g].sum()) for g in np.unique(groups[groups >= 0])]
    while sum(math.ceil(size / upper) for size in sizes) > towers:
        upper += 1
    return upper


def _allot_labels(bounds: Bounds) -> Iterator[IntArray]:
    """Ways to give every tower to one group, the most even first."""
    groups = np.unique(bounds.groups[bounds.groups >= 0])
    if len(groups) < 2:
        # One group, or none: nothing to keep out of any tower.
        only = int(groups[0]) if len(groups) else _NO_GROUP
        yield np.full(bounds.num_towers, only, dtype=np.int64)
        return
    sizes = [int(bounds.weights[bounds.groups == g].sum()) for g in groups]
    counts = [int((bounds.groups == g).sum()) for g in groups]
    least = [math.ceil(size / bounds.upper) for size in sizes]
    spare = bounds.num_towers - sum(least)
    if spare < 0:
        return
    shares = list(least)
    left_over = 0
    for _ in range(spare):
        open_groups = [g for g in range(len(groups)) if shares[g] < counts[g]]
        if open_groups:
            shares[max(open_groups, key=lambda g: sizes[g] / shares[g])] += 1
        else:
            left_over += 1
    first = (*shares, left_over)
    yield _spread_labels(groups, first)
    if math.comb(spare + len(groups), len(groups)) > 2000:
        return
    others = [
        (*(a + b for a, b in zip(least, extra, strict=False)), spare - sum(extra))
        for extra in itertools.product(range(spare + 1), repeat=len(groups))
        if sum(extra) <= spare
    ]
    others.sort(key=lambda ks: sum(abs(a - b) for a, b in zip(ks, first, strict=True)))
    for ks in others[1:_MAX_ALLOTMENTS]:
        yield _spread_labels(groups, ks)


def _spread_labels(groups: IntArray, shares: tuple[int, ...]) -> IntArray:
    return np.repeat(np.append(groups, _NO_GROUP), shares).astype(np.int64)


def place_units(
    bounds: Bounds,
    labels: IntArray,
    cost_TU: FloatArray,
    *,
    rng: np.random.Generator,
    effort: int = 1,
) -> IntArray | None:
    """Place all units, cheaply, within the bounds (loads aside).

    Args:
        bounds: Sizes and what must not meet.
        labels: The group of every tower, shape (T,).
        cost_TU: Cost of every unit in every tower; equal costs go to the smallest tower.
        rng: Breaks ties where a first search failed.
        effort: Factor on the nodes that the search may visit.

    Returns:
        Tower of every unit, shape (U,), or None where the search found nothing.
    """
    search = _Search(bounds, labels, cost_TU)
    if not search.place_hard(rng, effort=effort):
        return None
    for group in [*np.unique(labels[labels >= 0]), _NO_GROUP]:
        easy = np.flatnonzero((search.assignment < 0) & (bounds.groups == group))
        search.fill_by_regret(easy)
    return search.assignment if search.raise_to_lower() else None


def _hard_units(bounds: Bounds) -> BoolArray:
    hard: BoolArray = bounds.weights > 1
    return hard if bounds.apart is None else hard | bounds.apart.any(axis=1)


class _Search:
    def __init__(self, bounds: Bounds, labels: IntArray, cost_TU: FloatArray) -> None:
        self._bounds = bounds
        self._labels = labels
        self._cost_TU = cost_TU
        self.assignment = np.full(len(bounds.weights), -1, dtype=np.int64)
        self._sizes = np.zeros(bounds.num_towers, dtype=np.int64)
        self._hard = _hard_units(bounds)
        easy = bounds.groups[~self._hard]
        self._easy_counts = {int(g): int((easy == g).sum()) for g in np.unique(labels)}
        self._easy_free = int((easy == _NO_GROUP).sum())
        # With one group nothing is kept apart: every label takes every unit.
        self._one_group = len(np.unique(bounds.groups[bounds.groups >= 0])) < 2

    def _open_to(self, unit: int) -> BoolArray:
        """Towers whose label takes the unit, shape (T,)."""
        group = self._bounds.groups[unit]
        if self._one_group or group == _NO_GROUP:
            return np.ones(len(self._labels), dtype=bool)
        return np.asarray(self._labels == group)

    def place_hard(self, rng: np.random.Generator, *, effort: int) -> bool:
        """Place the units that are heavy or must be apart, by depth-first search."""
        bounds = self._bounds
        degree = 0 if bounds.apart is None else bounds.apart.sum(axis=1)
        order = np.flatnonzero(self._hard)
        ranks = np.broadcast_to(degree, len(self._hard))[order]
        order = order[np.lexsort((ranks, bounds.weights[order]))[::-1]]
        budget = effort * (4 * len(order) + 2000)
        stack = [iter(self._options(int(order[0]), rng, effort))] if len(order) else []
        if not stack:
            return self._easy_fit()
        while stack:
            unit = int(order[len(stack) - 1])
            if self.assignment[unit] >= 0:
                self._put(unit, -1)
            tower = next(stack[-1], None)
            if tower is None:
                stack.pop()
                continue
            budget -= 1
            if budget < 0:
                return False
            self._put(unit, tower)
            if len(stack) == len(order):
                if self._easy_fit():
                    return True
            else:
                stack.append(iter(self._options(int(order[len(stack)]), rng, effort)))
        return False

    def _put(self, unit: int, tower: int) -> None:
        old, weight = self.assignment[unit], self._bounds.weights[unit]
        if old >= 0:
            self._sizes[old] -= weight
        if tower >= 0:
            self._sizes[tower] += weight
        self.assignment[unit] = tower

    def _options(self, unit: int, rng: np.random.Generator, effort: int) -> list[int]:
        """Towers that a unit may go to, the cheapest and then the smallest first."""
        bounds = self._bounds
        allowed = self._open_to(unit) & (self._sizes + bounds.weights[unit] <= bounds.upper)
        if bounds.apart is not None:
            enemies = self.assignment[bounds.apart[unit]]
            allowed[enemies[enemies >= 0]] = False
        towers = np.flatnonzero(allowed)
        ties = rng.random(len(towers)) if effort > 1 else towers
        order = np.lexsort((ties, self._sizes[towers], self._cost_TU[towers, unit]))
        options, empty_labels = [], set()
        for tower in towers[order]:
            # Empty towers of one label are alike: trying one of them is enough.
            if self._sizes[tower] == 0:
                label = int(self._labels[tower])
                if label in empty_labels:
                    continue
                empty_labels.add(label)
            options.append(int(tower))
        return options

    def _easy_fit(self) -> bool:
        """Whether the easy units still fit: a count, exact because each weighs one."""
        room, missing, free = 0, 0, self._easy_free
        space = np.maximum(self._bounds.upper - self._sizes, 0)
        lacking = np.maximum(self._bounds.lower - self._sizes, 0)
        if self._one_group:
            easy = int((~self._hard).sum())
            return easy <= int(space.sum()) and int(lacking.sum()) <= easy
        for label in np.unique(self._labels):
            mine = self._labels == label
            own = 0 if label == _NO_GROUP else self._easy_counts[int(label)]
            if own > space[mine].sum():
                return False
            room += int(space[mine].sum()) - own
            missing += max(0, int(lacking[mine].sum()) - own)
        return free <= room and missing <= free

    def fill_by_regret(self, units: IntArray) -> None:
        """Place easy units of one group, those first that lose most by their second choice."""
        if not len(units):
            return
        open_towers = self._open_to(int(units[0]))
        waiting = units
        while len(waiting):
            room = np.where(open_towers, self._bounds.upper - self._sizes, 0)
            towers = np.flatnonzero(room > 0)
            if not len(towers):
                return
            # A last key of sizes spreads units evenly where costs tell nothing.
            cost = self._cost_TU[np.ix_(towers, waiting)]
            best = cost.argmin(axis=0)
            if not np.ptp(cost, axis=0).any():
                best = self._spread_evenly(len(waiting), self._sizes[towers], room[towers])
            lowest = np.take_along_axis(cost, best[None], axis=0)[0]
            np.put_along_axis(cost, best[None], np.inf, axis=0)
            regret = cost.min(axis=0) - lowest
            order = np.argsort(-regret, kind="stable")
            # Take everyone up to the first who finds the tower full, then look again.
            rank = np.zeros(len(waiting), dtype=np.int64)
            for t in range(len(towers)):
                chosen = order[best[order] == t]
                rank[chosen] = np.arange(len(chosen))
            over = np.flatnonzero(rank[order] >= room[towers][best[order]])
            taken = order[: over[0]] if len(over) else order
            self.assignment[waiting[taken]] = towers[best[taken]]
            np.add.at(self._sizes, towers[best[taken]], 1)
            waiting = np.delete(waiting, taken)

    @staticmethod
    def _spread_evenly(count: int, sizes: IntArray, room: IntArray) -> IntArray:
        slots = [
            (int(size) + k, t)
            for t, (size, space) in enumerate(zip(sizes, room, strict=True))
            for k in range(min(int(space), count))
        ]
        chosen = [t for _, t in sorted(slots)[:count]]
        # Whoever finds no slot is refused a tower by the caller's count of room.
        return np.array(chosen + [0] * (count - len(chosen)), dtype=np.int64)

    def raise_to_lower(self) -> bool:
        """Shift easy units, along chains of towers where need be, until no tower is too small."""
        if (self.assignment < 0).any():
            return False
        while (self._sizes < self._bounds.lower).any():
            tower = int(np.flatnonzero(self._sizes < self._bounds.lower)[0])
            if not self._pull_into(tower):
                return False
        return True

    def _pull_into(self, target: int) -> bool:
        came_from: dict[int, tuple[int, int]] = {}
        queue, seen = [target], {target}
        for tower in queue:
            takers = ~self._hard & (self.assignment != tower)
            if not self._one_group:
                groups = self._bounds.groups
                takers &= (groups == _NO_GROUP) | (groups == self._labels[tower])
            for source in np.unique(self.assignment[takers]):
                if int(source) in seen:
                    continue
                inside = np.flatnonzero(takers & (self.assignment == source))
                loss = self._cost_TU[tower, inside] - self._cost_TU[source, inside]
                came_from[int(source)] = (int(inside[loss.argmin()]), tower)
                if self._sizes[source] > self._bounds.lower:
                    self._follow(int(source), came_from, target)
                    return True
                seen.add(int(source))
                queue.append(int(source))
        return False

    def _follow(self, source: int, came_from: dict[int, tuple[int, int]], target: int) -> None:
        while source != target:
            unit, tower = came_from[source]
            self._put(unit, tower)
            source = tower
