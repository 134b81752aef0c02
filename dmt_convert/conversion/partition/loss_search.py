"""Search for the towers whose joint codes lose least.

Letters: F features, U units (features that must share a tower), T towers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.arrays import Float64Array, IntArray
from dmt_convert.conversion.partition.joint_code import JointCodes
from dmt_convert.conversion.partition.search import Start, TowerState, pair_costs, search_towers

_GAIN: Final = 1e-9
"""Least gain of a change, as a fraction of the loss."""
_WORK: Final = 3_000_000_000
"""Cubed widths of all eigenproblems that a search may solve; some seconds."""
_SOLVE: Final = 40**3
"""What the smallest eigenproblem costs."""
_TRIED: Final = 512
"""Changes that are tried of all units in a pass, if there are many: the most promising of each."""
_LEAST_TRIED: Final = 2
_ROUNDS: Final = 12
_PATIENCE: Final = 4
"""Rounds without a gain after which the search ends."""
_ALL_SEEN: Final = 8
"""Units up to which more rounds cost nothing: every tower has soon been solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Towers, what they lose, and how they were found."""

    assignment: IntArray
    """Tower of every unit, shape (U,)."""
    savings: Float64Array
    """What one code for two features saves, shape (F, F)."""
    lost: float | None
    """Their loss; None if it was not computed."""
    how: str
    """What was computed, in one line."""


def search_by_loss(start: Start, codes: JointCodes, *, rng: np.random.Generator) -> Found:
    """Find the towers that lose least, from what pairs of features save to what towers lose.

    Pairs are cheap to measure, so a search on them comes first, whatever the number of features.
    Then units change places as long as the exact loss falls. The work of that is bounded by the
    eigenproblems it solves, not by time, so the result depends on the seed alone.

    Args:
        start: A feasible assignment, from `find_start`.
        codes: What is lost.
        rng: The only source of randomness.
    """
    savings = codes.savings()
    pair_UU = pair_costs(start.bounds.units, savings, coherent=True)
    first = search_towers(start, pair_UU, rng=rng)
    how = "by what pairs of features save"
    lost = None
    if codes.measures_loss:
        search = _Search(start, codes, pair_UU)
        first = search.run(first, rng)
        lost = search.loss(first)
        limit = ", as many as a search may" if search.spent() else ""
        how += f", then by the loss itself ({search.solved} codes solved{limit})"
    else:
        how += "; towers emit too many elements to compare them by the loss itself"
    if not codes.joint:
        how += (
            "; features were drawn one by one, so it is not known what they share: "
            "--calibration tells"
        )
    return Found(assignment=first, savings=savings, lost=lost, how=how)


class _Search:
    """Assignments compared by their loss; a tower is solved once, however often it is met."""

    def __init__(self, start: Start, codes: JointCodes, pair_UU: Float64Array) -> None:
        self._start, self._codes, self._pair_UU = start, codes, pair_UU
        self._members = start.bounds.units.members
        widths = codes.widths()
        self._widths = np.array([widths[list(features)].sum() for features in self._members])
        self._spectra: dict[int, Float64Array] = {}
        self._priced: dict[int, float] = {}
        self._price = 0.0
        self._masks_now: list[int] = []
        self._cost_TU = pair_UU
        self._work = 0
        self.solved = 0

    def spent(self) -> bool:
        """Whether no more codes may be solved."""
        return self._work > _WORK

    def run(self, first: IntArray, rng: np.random.Generator) -> IntArray:
        """Improve an assignment, and others that differ in a few units; return the best."""
        state = TowerState(self._start.bounds, first)
        units = len(first)
        best, least = first, np.inf
        idle, patience = 0, _PATIENCE if units > _ALL_SEEN else 4 * _ROUNDS
        for number in range(max(_ROUNDS, patience)):
            state.assign(best)
            if number:
                state.shuffle(int(rng.integers(2, max(4, units // 4))), rng=rng)
            loss = self._improve(state, rng)
            idle += 1
            if loss < least * (1 - _GAIN):
                best, least, idle = state.assignment.copy(), loss, 0
            if self.spent() or idle > patience:
                break
        return best

    def loss(self, assignment: IntArray) -> float:
        """What the towers of an assignment lose."""
        return self._codes.lost([self._solve(m) for m in self._masks(assignment)])

    def _improve(self, state: TowerState, rng: np.random.Generator) -> float:
        """Let units move or change places as long as the loss falls; return the loss."""
        loss, improved = self._settle(state), True
        while improved and not self.spent():
            improved = False
            for unit in rng.permutation(len(state.assignment)):
                bound, other, tower = self._find_change(int(unit), state)
                if bound >= -_GAIN * loss:
                    continue
                before = state.assignment.copy()
                _change(state, int(unit), other, tower)
                changed = self.loss(state.assignment)
                if changed < loss * (1 - _GAIN):
                    loss, improved = self._settle(state), True
                else:
                    state.assign(before)
        return loss

    def _settle(self, state: TowerState) -> float:
        """Return the loss of an assignment, and take the price of an element from it."""
        self._masks_now = self._masks(state.assignment)
        spectra = [self._solve(mask) for mask in self._masks_now]
        self._price = self._codes.price(spectra)
        self._priced.clear()
        inside = np.arange(len(spectra))[:, None] == state.assignment
        self._cost_TU = inside.astype(np.float64) @ self._pair_UU
        return self._codes.lost(spectra)

    def _find_change(self, unit: int, state: TowerState) -> tuple[float, int, int]:
        """Best change of one unit: what the loss changes at least, partner or -1, new tower.

        At the price of an element, towers lose independently of each other, and the change of the
        sum bounds that of the loss from below. So changes that cost more are out.
        """
        masks, here = self._masks_now, int(state.assignment[unit])
        best = (0.0, -1, here)
        if self.spent():
            return best
        for other, tower in self._promising(unit, state):
            flipped = 1 << unit | (1 << other if other >= 0 else 0)
            old = self._priced_loss(masks[here]) + self._priced_loss(masks[tower])
            new = self._priced_loss(masks[here] ^ flipped)
            if new - old >= best[0]:
                continue  # the other tower can only add to it
            new += self._priced_loss(masks[tower] ^ flipped)
            best = min(best, (new - old, other, tower))
            if self.spent():
                break
        return best

    def _promising(self, unit: int, state: TowerState) -> list[tuple[int, int]]:
        """Partners (or -1) and towers of changes that pairs of features say are the best."""
        pair_UU, assignment, cost_TU = self._pair_UU, state.assignment, self._cost_TU
        here, own_T = int(assignment[unit]), cost_TU[:, unit]
        others = np.flatnonzero(state.find_swaps(unit))
        there = assignment[others]
        costs = own_T[there] - own_T[here] - 2 * pair_UU[unit, others]
        costs += cost_TU[here, others] - cost_TU[there, others]
        moves = np.flatnonzero(state.find_moves(unit))
        changes = [(int(o), int(t)) for o, t in zip(others, there, strict=True)]
        changes += [(-1, int(t)) for t in moves]
        order = np.argsort(np.concatenate([costs, own_T[moves] - own_T[here]]), kind="stable")
        most = max(_LEAST_TRIED, _TRIED // len(assignment))
        return [changes[i] for i in order[:most]]

    def _masks(self, assignment: IntArray) -> list[int]:
        """Units of every tower, as bits."""
        masks = [0] * self._start.bounds.num_towers
        for unit, tower in enumerate(assignment.tolist()):
            masks[tower] |= 1 << unit
        return masks

    def _priced_loss(self, mask: int) -> float:
        """Loss of a tower that pays for every element beyond the first, or loses what it saves."""
        found = self._priced.get(mask)
        if found is None:
            found = float(np.minimum(self._solve(mask)[1:], self._price).sum())
            self._priced[mask] = found
        return found

    def _solve(self, mask: int) -> Float64Array:
        """Eigenvalues of a tower's code."""
        found = self._spectra.get(mask)
        if found is None:
            units = [unit for unit in range(len(self._members)) if mask >> unit & 1]
            found = self._codes.solve([f for unit in units for f in self._members[unit]])
            self._spectra[mask] = found
            self._work += int(self._widths[units].sum()) ** 3 + _SOLVE
            self.solved += 1
        return found


def _change(state: TowerState, unit: int, other: int, tower: int) -> None:
    if other < 0:
        state.move(unit, tower)
    else:
        state.swap(unit, other)
