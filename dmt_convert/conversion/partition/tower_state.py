"""An assignment of units to towers under change: what may move, and what it would gain.

Letters: U units, T towers, K kinds of load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.conversion.partition.units import BoolArray, FloatArray, IntArray

_SLACK: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What every tower must keep to."""

    num_towers: int
    """T."""
    lower: int
    """Least number of features of a tower."""
    upper: int
    """Greatest number of features of a tower."""
    weights: IntArray
    """Features per unit, shape (U,)."""
    groups: IntArray
    """Group of every unit, -1 for none, shape (U,)."""
    apart: BoolArray | None
    """Units that must not meet, shape (U, U), groups left out."""
    loads: FloatArray | None
    """Loads as fractions of a tower's bound, shape (U, K); None where loads are unbounded."""

    def conflicts(self) -> BoolArray | None:
        """Units that must not meet, groups included, shape (U, U)."""
        if self.groups.max(initial=-1) < 1:
            return self.apart
        grouped = self.groups >= 0
        differ = self.groups[:, None] != self.groups[None, :]
        strangers: BoolArray = grouped[:, None] & grouped[None, :] & differ
        return strangers if self.apart is None else strangers | self.apart


class TowerState:
    """Units in towers, with the sums that make a change cheap to judge."""

    def __init__(self, bounds: Bounds, assignment: IntArray) -> None:
        self.bounds = bounds
        self.assignment = assignment.copy()
        towers, units = bounds.num_towers, len(assignment)
        self._single = bool((bounds.weights == 1).all())
        self.sizes = np.bincount(assignment, bounds.weights, towers).astype(np.int64)
        self.loads = np.zeros((towers, 0))
        if bounds.loads is not None:
            self.loads = np.zeros((towers, bounds.loads.shape[1]))
            np.add.at(self.loads, assignment, bounds.loads)
        self._conflicts = bounds.conflicts()
        self._met = np.zeros((0, 0), dtype=np.int64)
        if self._conflicts is not None:
            inside = np.zeros((units, towers), dtype=np.float32)
            inside[np.arange(units), assignment] = 1
            self._met = np.rint(self._conflicts.astype(np.float32) @ inside).astype(np.int64)

    def move(self, unit: int, tower: int) -> None:
        """Put one unit into another tower."""
        old, weight = self.assignment[unit], self.bounds.weights[unit]
        self.assignment[unit] = tower
        self.sizes[old] -= weight
        self.sizes[tower] += weight
        if self.bounds.loads is not None:
            self.loads[old] -= self.bounds.loads[unit]
            self.loads[tower] += self.bounds.loads[unit]
        if self._conflicts is not None:
            self._met[:, old] -= self._conflicts[unit]
            self._met[:, tower] += self._conflicts[unit]

    def find_moves(self, unit: int, *, sizes: bool = True, loads: bool = True) -> BoolArray:
        """Towers that a unit may move to, shape (T,)."""
        old, weight = self.assignment[unit], self.bounds.weights[unit]
        allowed: BoolArray = np.arange(self.bounds.num_towers) != old
        if sizes:
            allowed &= self.sizes + weight <= self.bounds.upper
            allowed &= bool(self.sizes[old] - weight >= self.bounds.lower)
        if self._conflicts is not None:
            allowed &= self._met[unit] == 0
        if loads and self.bounds.loads is not None:
            allowed &= (self.loads + self.bounds.loads[unit] <= 1 + _SLACK).all(axis=1)
        return allowed

    def find_swaps(self, unit: int, *, loads: bool = True) -> BoolArray:
        """Units that a unit may change places with, shape (U,)."""
        old, new, bounds = self.assignment[unit], self.assignment, self.bounds
        allowed: BoolArray = new != old
        if not self._single:
            change = bounds.weights[unit] - bounds.weights
            there, here = self.sizes[new] + change, self.sizes[old] - change
            allowed &= (there <= bounds.upper) & (there >= bounds.lower)
            allowed &= (here <= bounds.upper) & (here >= bounds.lower)
        if self._conflicts is not None:
            mutual = self._conflicts[unit]
            allowed &= self._met[unit][new] == mutual
            allowed &= self._met[:, old] == mutual
        if loads and bounds.loads is not None:
            there, here = self._swapped_loads(unit)
            allowed &= ((there <= 1 + _SLACK) & (here <= 1 + _SLACK)).all(axis=1)
        return allowed

    def _swapped_loads(self, unit: int) -> tuple[FloatArray, FloatArray]:
        assert self.bounds.loads is not None
        change = self.bounds.loads[unit] - self.bounds.loads
        return self.loads[self.assignment] + change, self.loads[self.assignment[unit]] - change

    @property
    def overload(self) -> FloatArray:
        """By how much every tower's loads exceed their bounds, in all, shape (T,)."""
        return np.asarray(np.maximum(self.loads - 1 - _SLACK, 0).sum(axis=1))

    def repair_loads(self, rng: np.random.Generator, *, max_changes: int) -> bool:
        """Move and swap units until no load exceeds its bound.

        Returns:
            Whether that was reached.
        """
        for _ in range(max_changes):
            overload = self.overload
            if not overload.any():
                return True
            worst = int(overload.argmax())
            inside = np.flatnonzero(self.assignment == worst)
            changes = [self._find_relief(u, overload) for u in rng.permutation(inside)[:32]]
            relief, unit, other, tower = max(changes, key=lambda change: change[0])
            if relief <= _SLACK:
                # A dead end: shake by one random swap and try on.
                unit = int(rng.choice(inside))
                partners = np.flatnonzero(self.find_swaps(unit, loads=False))
                if not len(partners):
                    return False
                other, tower = int(rng.choice(partners)), -1
            if other >= 0:
                self._swap(unit, other)
            else:
                self.move(unit, tower)
        return not self.overload.any()

    def _find_relief(self, unit: int, overload: FloatArray) -> tuple[float, int, int, int]:
        """Best change of one unit: relief, unit, partner or -1, tower or -1."""
        assert self.bounds.loads is not None
        old = self.assignment[unit]
        there, here = self._swapped_loads(unit)
        after = np.maximum(there - 1, 0).sum(axis=1) + np.maximum(here - 1, 0).sum(axis=1)
        relief = overload[self.assignment] + overload[old] - after
        relief[~self.find_swaps(unit, loads=False)] = -np.inf
        other = int(relief.argmax())
        load = self.bounds.loads[unit]
        after_T = np.maximum(self.loads + load - 1, 0).sum(axis=1)
        after_T += np.maximum(self.loads[old] - load - 1, 0).sum()
        relief_T = overload + overload[old] - after_T
        relief_T[~self.find_moves(unit, loads=False)] = -np.inf
        tower = int(relief_T.argmax())
        if relief_T[tower] > relief[other]:
            return float(relief_T[tower]), unit, -1, tower
        return float(relief[other]), unit, other, -1

    def _swap(self, unit: int, other: int) -> None:
        here, there = int(self.assignment[unit]), int(self.assignment[other])
        self.move(unit, there)
        self.move(other, here)

    def improve(
        self,
        cost_TU: FloatArray,
        *,
        rng: np.random.Generator,
        pair_UU: FloatArray | None = None,
        max_passes: int = 20,
    ) -> float:
        """Move and swap units, one after the other, as long as that lowers the cost.

        Args:
            cost_TU: Cost of every unit in every tower.
            rng: Order in which units are looked at.
            pair_UU: Where costs depend on who else is there: symmetric, zero diagonal, and
                `cost_TU[t, u]` the sum of `pair_UU[u]` over the units of tower t, which is
                then kept up to date in place.
            max_passes: Passes over all units at most.

        Returns:
            What was gained (at least 0).
        """
        units = np.arange(len(self.assignment))
        gained = 0.0
        for _ in range(max_passes):
            before = gained
            current = cost_TU[self.assignment, units]
            for unit in rng.permutation(len(units)):
                gain, other, tower = self._find_gain(unit, cost_TU, current, pair_UU)
                if gain <= _SLACK:
                    continue
                gained += gain
                moved = [(unit, tower)]
                if other >= 0:
                    moved = [(unit, int(self.assignment[other])), (other, tower)]
                for u, t in moved:
                    if pair_UU is not None:
                        cost_TU[self.assignment[u]] -= pair_UU[u]
                        cost_TU[t] += pair_UU[u]
                    self.move(u, t)
                current = cost_TU[self.assignment, units]
            if gained == before:
                break
        return gained

    def _find_gain(
        self, unit: int, cost_TU: FloatArray, current: FloatArray, pair_UU: FloatArray | None
    ) -> tuple[float, int, int]:
        """Best change of one unit: gain, partner or -1, tower (of the partner's new home)."""
        old = int(self.assignment[unit])
        own = cost_TU[:, unit]
        gains = current[unit] - own[self.assignment] + current - cost_TU[old]
        if pair_UU is not None:
            gains += 2 * pair_UU[unit]
        gains[~self.find_swaps(unit)] = -np.inf
        other = int(gains.argmax())
        moves = self.find_moves(unit)
        if moves.any():
            move_gains = np.where(moves, current[unit] - own, -np.inf)
            tower = int(move_gains.argmax())
            if move_gains[tower] >= gains[other]:
                return float(move_gains[tower]), -1, tower
        return float(gains[other]), other, old
