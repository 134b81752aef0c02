"""What one step asks of the busiest rank: bytes of every exchange, bytes looked up, FLOPs.

Letters: B samples per rank, F features, N embedding dim, H hosts, R ranks per host, W = H * R,
P groups of k hosts that hold towers together (P = H, k = 1 unless there are fewer towers).

The flat model is one tower over all hosts that emits its embeddings as they are: P = 1, k = H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmt_convert.interactions import NO_WORK, DenseWork
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec, one_tower
from dmt_convert.placement import (
    ELEMENT_BYTES,
    ID_BYTES,
    Cluster,
    Exchange,
    TableLoad,
    TowerPlan,
    Traffic,
    measure_ranks,
    measure_traffic,
    tower_loads,
)
from dmt_convert.placement.predict.model_work import ModelWork, count_work
from dmt_convert.spec import DTYPE_BYTES, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the busiest rank reads of its tables in one step."""

    row_bytes: float
    """Bytes of table rows, per sample of a rank's own batch."""
    mean_row_bytes: float
    """The same of a mean rank."""
    pooled_bytes: float
    """Bytes of the pooled embeddings, as float32, per sample of a rank's own batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """A model in towers on a cluster."""

    groups: int
    """P."""
    group_hosts: int
    """k."""
    traffic: Traffic
    """All exchanges, in float32."""
    lookup: Lookup
    """Of the busiest rank."""
    module: DenseWork
    """Tower modules of the busiest group of hosts: a rank runs them for P * B samples."""
    work: ModelWork
    """All dense parts."""


def planned_load(
    model: DmtSpec, plan: TowerPlan, ids_per_bag: float, *, even_ranks: bool = False
) -> StepLoad:
    """Describe a model where a plan puts it.

    Args:
        model: The converted model; its passthrough twin gives SPTT alone.
        plan: Where its tables lie.
        ids_per_bag: Mean number of ids per sample and feature.
        even_ranks: Whether the ranks of a group of hosts share its tables evenly, instead of as
            the plan says; groups stay as uneven as their towers.
    """
    ids = dict.fromkeys(model.flat.feature_names, ids_per_bag)
    towers = tower_loads(model.flat, model.assignment, ids)
    loads = {table.name: table for tables in towers for table in tables}
    placed = {placement.table: placement for placement in plan.tables}
    world = plan.cluster.world_size
    rank_widths: Sequence[float]
    _, rank_ids, rank_widths = measure_ranks(loads, placed, world)
    rank_rows: Sequence[float] = _rank_row_bytes(loads, plan)
    if even_ranks:
        size = plan.hosts_per_tower * plan.cluster.ranks_per_host
        rank_ids, rank_rows = _even_out(rank_ids, size), _even_out(rank_rows, size)
        rank_widths = _even_out(rank_widths, size)
    work = count_work(model)
    group_of = {hosts: i for i, hosts in enumerate(sorted(set(plan.tower_hosts)))}
    groups = [_Group() for _ in group_of]
    for hosts, tables, width, module in zip(
        plan.tower_hosts, towers, model.tower_widths, work.towers, strict=True
    ):
        groups[group_of[hosts]].add(tables, width, module)
    return StepLoad(
        groups=len(groups),
        group_hosts=plan.hosts_per_tower,
        traffic=measure_traffic(
            plan.cluster,
            group_hosts=plan.hosts_per_tower,
            group_widths=[group.width for group in groups],
            rank_widths=rank_widths,
            rank_ids=rank_ids,
            flat_width=sum(model.flat.feature_dims),
            ids=[group.ids for group in groups],
        ),
        lookup=Lookup(
            row_bytes=world * max(rank_rows),
            mean_row_bytes=math.fsum(rank_rows),
            pooled_bytes=float(world * max(rank_widths) * ELEMENT_BYTES),
        ),
        module=max((group.work for group in groups), key=lambda work: work.flops),
        work=work,
    )


def _even_out(per_rank: Sequence[float], size: int) -> list[float]:
    """Give every rank of a group of so many the group's mean."""
    means: list[float] = []
    for first in range(0, len(per_rank), size):
        means += [math.fsum(per_rank[first : first + size]) / size] * size
    return means


def even_load(model: DmtSpec, cluster: Cluster, ids_per_bag: float) -> StepLoad:
    """Describe a model whose towers and tables are spread perfectly evenly.

    Args:
        model: The converted model; its towers are as many as hosts, or a divisor of them, or more.
        cluster: Where it runs.
        ids_per_bag: Mean number of ids per sample and feature.
    """
    groups = min(len(model.towers), cluster.hosts)
    work = count_work(model)
    rows, pooled = _flat_bytes(model.flat, ids_per_bag)
    ids = len(model.flat.features) * ids_per_bag
    width = sum(model.flat.feature_dims)
    modules = sum(work.towers, NO_WORK)
    hosts = cluster.hosts // groups
    return StepLoad(
        groups=groups,
        group_hosts=hosts,
        traffic=_even_traffic(cluster, groups, sum(model.tower_widths), width, ids),
        lookup=Lookup(row_bytes=rows, mean_row_bytes=rows, pooled_bytes=pooled),
        module=DenseWork(
            flops=modules.flops / groups, parameters=math.ceil(modules.parameters / groups)
        ),
        work=work,
    )


def _even_traffic(cluster: Cluster, groups: int, emitted: int, width: int, ids: float) -> Traffic:
    """Return what `measure_traffic` gives where every rank holds the same."""
    hosts, ranks, world = cluster.hosts, cluster.ranks_per_host, cluster.world_size
    group_hosts = hosts // groups
    group_ranks = group_hosts * ranks

    def among(per_sample: float, all_ranks: int) -> Exchange:
        return Exchange(
            cross_bytes=per_sample * (all_ranks - ranks) / all_ranks,
            intra_bytes=per_sample * (ranks - 1) / all_ranks,
        )

    def between(per_sample: float) -> Exchange:
        return Exchange(cross_bytes=per_sample * (groups - 1) / groups, intra_bytes=0.0)

    embeddings, outputs = float(width * ELEMENT_BYTES), float(emitted * ELEMENT_BYTES)
    id_bytes = ids * ID_BYTES
    inside = among(embeddings, group_ranks)
    flat = among(embeddings, world)
    return Traffic(
        flat_cross_bytes=flat.cross_bytes,
        dmt_cross_bytes=between(outputs).cross_bytes + inside.cross_bytes,
        flat_indices=among(id_bytes, world),
        flat_embeddings=flat,
        peer_indices=between(id_bytes),
        tower_indices=among(id_bytes, group_ranks),
        tower_embeddings=inside,
        tower_outputs=between(outputs),
    )


def as_passthrough(model: DmtSpec) -> DmtSpec:
    """Return the model with the same towers and no compression: SPTT alone."""
    bare = TowerModuleSpec(kind="passthrough")
    return converted_spec(model.flat, model.assignment.towers, bare)


def as_flat(flat: ModelSpec) -> DmtSpec:
    """Return a flat model as one tower."""
    return one_tower(flat)


class _Group:
    """Sums over the towers of one group of hosts."""

    def __init__(self) -> None:
        self.width, self.ids, self.work = 0, 0.0, NO_WORK

    def add(self, tables: Sequence[TableLoad], width: int, module: DenseWork) -> None:
        self.width += width
        self.ids += math.fsum(table.ids for table in tables)
        self.work += module


def _flat_bytes(spec: ModelSpec, ids_per_bag: float) -> tuple[float, float]:
    sizes = {table.name: table.dim * DTYPE_BYTES[table.dtype] for table in spec.tables}
    rows = ids_per_bag * sum(sizes[feature.table] for feature in spec.features)
    return rows, float(sum(spec.feature_dims) * ELEMENT_BYTES)


def _rank_row_bytes(loads: Mapping[str, TableLoad], plan: TowerPlan) -> list[float]:
    """Bytes of rows that each rank reads per sample of the global batch."""
    found = [0.0] * plan.cluster.world_size
    for placement in plan.tables:
        load = loads[placement.table]
        parts = len(placement.shards) if placement.sharding_type == "table_row_wise" else 1
        for shard in placement.shards:
            found[shard.rank] += load.ids / parts * shard.cols * load.element_bytes
    return found
