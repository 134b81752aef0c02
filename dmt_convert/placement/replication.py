"""Which tables are cheaper on every rank: sums of their gradients against what they would send.

A feature in a tower costs bytes for every sample: what is emitted of it, the gradient of that, and
its ids. A table on every rank costs the sum of its gradients once a step, however many samples
there are. So what is small, and looked up often, is cheaper on every rank.

Letters: R rows of a table, D its columns, B samples of a rank, L ranks per host, H hosts,
W = H * L, P ids per bag, CR compression of what towers emit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from dmt_convert.model import DmtSpec
from dmt_convert.placement.cluster import Cluster, show_bytes
from dmt_convert.placement.table_memory import copy_bytes
from dmt_convert.placement.tower_plan import TowerPlan
from dmt_convert.placement.traffic import ELEMENT_BYTES, ID_BYTES, ring_bytes
from dmt_convert.spec import ModelSpec

BATCH: Final = 1024
"""B, if nobody says."""
MARGIN: Final = 0.8
"""Share of the bytes that are saved up to which gradients may cost: the whole table is also moved
in every step, so it has to pay clearly in bytes."""
_WORTH_SAYING: Final = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What features cost in one step, in bytes that a host sends; as many come in."""

    cluster: Cluster
    """H, L."""
    batch: int = BATCH
    """B."""
    compression: float = 1.0
    """CR, of bytes."""

    def exchanged(self, dim: int, ids: float) -> float:
        """Bytes of a feature in a tower: what is emitted, its gradient, its ids.

        Args:
            dim: D.
            ids: P.
        """
        vectors = 2 * ELEMENT_BYTES * dim / self.compression
        share = (self.cluster.hosts - 1) / self.cluster.hosts
        return self.cluster.ranks_per_host * self.batch * share * (vectors + ID_BYTES * ids)

    def summed(self, rows: int, dim: int) -> float:
        """Bytes of a table on every rank: the sum of its gradients."""
        return ring_bytes(self.cluster, rows * dim)


def cheaper_everywhere(
    spec: ModelSpec,
    cost: StepCost,
    ids_per_bag: Mapping[str, float] | None = None,
    *,
    margin: float = MARGIN,
) -> tuple[str, ...]:
    """Return the tables that cost less on every rank, those with the fewest rows first.

    With H hosts that is R < margin L B sum over its features of (1/CR + P/D), times
    ((H - 1)/H) (W/(W - 1)), because a ring passes the last rank of a host to the first of the next.

    Args:
        spec: The flat model.
        cost: What a step costs.
        ids_per_bag: P of every feature; 1 if it is not named.
        margin: What a table may cost on every rank, of what it saves.
    """
    ids = ids_per_bag or {}
    saved = dict.fromkeys((table.name for table in spec.tables), 0.0)
    dims = {table.name: table.dim for table in spec.tables}
    for feature in spec.features:
        saved[feature.table] += cost.exchanged(dims[feature.table], ids.get(feature.name, 1.0))
    cheaper = [
        table
        for table in spec.tables
        if cost.summed(table.rows, table.dim) < margin * saved[table.name]
    ]
    return tuple(table.name for table in sorted(cheaper, key=lambda table: table.rows))


def step_bytes(
    spec: ModelSpec,
    cost: StepCost,
    everywhere: Collection[str] = (),
    ids_per_bag: Mapping[str, float] | None = None,
) -> float:
    """Return the bytes that a host sends in a step if some tables are on every rank.

    Args:
        spec: The flat model.
        cost: What a step costs.
        everywhere: These tables; the others are in towers.
        ids_per_bag: P of every feature; 1 if it is not named.
    """
    ids, dims = ids_per_bag or {}, {table.name: table.dim for table in spec.tables}
    sent = math.fsum(
        cost.exchanged(dims[feature.table], ids.get(feature.name, 1.0))
        for feature in spec.features
        if feature.table not in everywhere
    )
    return sent + math.fsum(
        cost.summed(table.rows, table.dim) for table in spec.tables if table.name in everywhere
    )


def describe_replication(plan: TowerPlan) -> str | None:
    """Say in a line which tables every rank holds, and what that costs; None if there are none."""
    held = [placement for placement in plan.tables if placement.is_everywhere]
    if not held:
        return None
    kept = sum(copy_bytes(table.rows, table.cols, optimizer=plan.optimizer) for table in held)
    return (
        f"{len(held)} of {len(plan.tables)} tables, of up to {max(t.rows for t in held):,} rows: "
        f"{show_bytes(kept)} of a rank with gradients and optimizer state, "
        f"{show_bytes(plan.traffic.replicated_step_bytes)} of gradients per host and step"
    )


def advise_replication(model: DmtSpec, cluster: Cluster, *, batch: int = BATCH) -> str | None:
    """Say in a line what `--replicate auto` would save; None if it is not worth it.

    Args:
        model: A converted model.
        cluster: Where it runs.
        batch: B.
    """
    if not model.keeps_network or any(tower.everywhere for tower in model.towers):
        return None
    cost = StepCost(cluster=cluster, batch=batch, compression=max(1.0, model.compression))
    most = len(model.flat.tables) - len(model.towers)
    found = cheaper_everywhere(model.flat, cost)[: max(0, most)]
    before, after = step_bytes(model.flat, cost), step_bytes(model.flat, cost, found)
    if not found or before < _WORTH_SAYING * after:
        return None
    beside = "" if cost.compression == 1 else " at the same compression of the others"
    return (
        f"{len(found)} of {len(model.flat.tables)} tables would be cheaper on every rank: "
        f"--replicate auto: {before / after:.1f} times fewer bytes between hosts{beside} "
        f"({cluster.hosts} hosts of {cluster.ranks_per_host} ranks, {batch} samples each)"
    )
