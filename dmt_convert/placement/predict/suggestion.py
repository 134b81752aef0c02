"""Which number of towers and which compression would make a flat model fastest on a cluster.

Letters: T towers, H hosts, F features, N embedding dim, D output dim. The model's quality is not
predicted: a suggestion is where to start measuring it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, module_spec
from dmt_convert.placement import Cluster, plan_towers
from dmt_convert.placement.predict.cost_model import Machine, step_time
from dmt_convert.placement.predict.prediction import check_ids_per_bag, check_size
from dmt_convert.placement.predict.step_load import as_flat, even_load, planned_load
from dmt_convert.spec import ModelSpec, TowerAssignment

COMPRESSIONS: Final = (1, 2, 4, 8, 16)
"""Compressions that are tried; 1 is SPTT alone."""
MAX_TOWERS_PER_HOST: Final = 4
"""More towers than these on one host save nothing that fewer do not."""
TOLERANCE: Final = 0.03
"""The suggestion compresses as little as any candidate whose step is at most this much longer than
the fastest one's: compression costs quality, and the model is no more exact than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of towers and compression."""

    towers: int
    """T."""
    compression: float
    """What it really is: D is a whole number."""
    seconds: float
    """Predicted step."""
    speedup: float
    """Over flat."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "towers": self.towers,
            "compression": self.compression,
            "step_ms": self.seconds * 1e3,
            "speedup": self.speedup,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What would be fastest."""

    best: Candidate
    """The least compression within `TOLERANCE` of the fastest step."""
    candidates: tuple[Candidate, ...]
    """All that fit, the fastest first."""
    refused: tuple[int, ...]
    """Numbers of towers whose tables do not fit the cluster's memory."""

    @property
    def worth_it(self) -> bool:
        """Whether the best candidate beats the flat model."""
        return self.best.speedup > 1

    def to_json(self, limit: int = 5) -> dict[str, Any]:
        """Return a JSON-able dict with the fastest candidates."""
        return {
            "suggestion": {**self.best.to_json(), "beats_flat": self.worth_it},
            "candidates": [candidate.to_json() for candidate in self.candidates[:limit]],
            "towers_that_do_not_fit": list(self.refused),
        }


def suggest(flat: ModelSpec, machine: Machine, *, ids_per_bag: float = 1.0) -> Suggestion:
    """Try numbers of towers and compressions for a flat model on the machine's cluster.

    Tables are dealt to towers by size alone, as evenly as they go: which features belong together
    is for `dmt partition` to say.

    Args:
        flat: The flat model.
        machine: What it runs on.
        ids_per_bag: Mean number of ids per sample and feature.

    Raises:
        PlanError: No number of towers fits.
        ConfigError: The cluster is too large, or the number of ids is none.
    """
    check_ids_per_bag(ids_per_bag)
    cluster = machine.network.cluster
    check_size(cluster.world_size)
    base = step_time(even_load(as_flat(flat), cluster, ids_per_bag), machine).total
    found: list[Candidate] = []
    refused: list[int] = []
    failure: PlanError | None = None
    for towers in tower_counts(cluster, len(flat.tables)):
        try:
            found += [
                Candidate(
                    towers=towers,
                    compression=compression,
                    seconds=seconds,
                    speedup=base / seconds,
                )
                for compression, seconds in _try_towers(flat, towers, machine, ids_per_bag)
            ]
        except PlanError as error:
            refused.append(towers)
            failure = error
    if not found:
        assert failure is not None
        raise failure
    found.sort(key=lambda c: (c.seconds, c.compression, c.towers))
    limit = found[0].seconds * (1 + TOLERANCE)
    best = min(
        (candidate for candidate in found if candidate.seconds <= limit),
        key=lambda c: (round(c.compression, 6), c.seconds, c.towers),
    )
    return Suggestion(best=best, candidates=tuple(found), refused=tuple(refused))


def tower_counts(cluster: Cluster, most: int) -> list[int]:
    """Return numbers of towers worth trying: the largest divisors of H, and small multiples.

    One tower over several hosts compresses nothing that crosses them, so it is tried only where
    there is no other number.

    Args:
        cluster: Where the model runs.
        most: Tables, of which every tower needs one.
    """
    hosts = cluster.hosts
    divisors = [towers for towers in range(1, min(hosts, most) + 1) if hosts % towers == 0]
    multiples = [hosts * n for n in range(2, MAX_TOWERS_PER_HOST + 1) if hosts * n <= most]
    found = divisors[-4:] + multiples
    return found[1:] if found[0] == 1 < hosts and len(found) > 1 else found


def deal_tables(flat: ModelSpec, towers: int) -> TowerAssignment:
    """Deal tables to towers, the largest first to whichever tower holds the fewest bytes.

    No tower gets more than its even number of tables, rounded up.

    Args:
        flat: The model.
        towers: T, at most as many as tables.
    """
    room = math.ceil(len(flat.tables) / towers)
    heap = [(0, tower, 0) for tower in range(towers)]
    tower_of: dict[str, int] = {}
    for table in sorted(flat.tables, key=lambda table: -table.nbytes):
        size, tower, held = heapq.heappop(heap)
        tower_of[table.name] = tower
        if held + 1 < room:
            heapq.heappush(heap, (size + table.nbytes, tower, held + 1))
    members: list[list[str]] = [[] for _ in range(towers)]
    for feature in flat.features:
        members[tower_of[feature.table]].append(feature.name)
    return TowerAssignment(towers=tuple(map(tuple, members)))


def dealt_model(flat: ModelSpec, towers: int, compression: float) -> DmtSpec | None:
    """Return a flat model in towers with its own kind of module.

    Args:
        flat: The model.
        towers: T.
        compression: At least this much; 1 for none.

    Returns:
        None where the embeddings are too narrow for that compression.
    """
    if compression > 1:
        try:
            module = module_spec(flat, "auto", num_towers=towers, compression=compression)
        except ConfigError:
            return None
    else:
        module = TowerModuleSpec(kind="passthrough")
    assignment = deal_tables(flat, towers)
    return DmtSpec(
        flat=flat,
        towers=tuple(TowerSpec(features=names, module=module) for names in assignment.towers),
    )


def _try_towers(
    flat: ModelSpec, towers: int, machine: Machine, ids_per_bag: float
) -> Iterator[tuple[float, float]]:
    """Yield compression and predicted seconds of every compression that can be had."""
    plan = None
    for compression in COMPRESSIONS:
        model = dealt_model(flat, towers, compression)
        if model is None:
            continue
        if plan is None:  # widths differ by one factor for all towers, so the plan is the same
            plan = plan_towers(
                flat,
                model.assignment,
                machine.network.cluster,
                tower_widths=model.tower_widths,
            )
        load = planned_load(model, plan, ids_per_bag, even_ranks=True)
        yield model.compression, step_time(load, machine).total
