"""What one step asks of the busiest rank: bytes of every exchange, bytes looked up, FLOPs.

Letters: B samples per rank, F features, N embedding dim, H hosts, R ranks per host, W = H * R,
P groups of k hosts that hold towers together (P = H, k = 1 unless there are fewer towers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmt_convert.plan.cluster import Cluster
from dmt_convert.plan.host_packing import TableLoad
from dmt_convert.plan.model_work import NO_WORK, DenseWork, ModelWork, count_work
from dmt_convert.plan.packer import measure_ranks, tower_loads
from dmt_convert.plan.tower_plan import TowerPlan
from dmt_convert.plan.traffic import ELEMENT_BYTES, ID_BYTES, Exchange, Traffic, measure_traffic
from dmt_convert.spec import DTYPE_BYTES, ModelSpec
from dmt_convert.towers import DmtSpec, TowerModuleSpec, TowerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the busiest rank reads of its tables in one step."""

    row_bytes: float
    """Bytes of table rows, per sample of a rank's own batch."""
    pooled_bytes: float
    """Bytes of the pooled embeddings, as float32, per sample of a rank's own batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLoad:
    """A model in towers on a cluster."""

    groups: int
    """P."""
    group_hosts: int
    """k."""
    traffic: Traffic
    """All exchanges, flat ones too, in float32."""
    lookup: Lookup
    """Of the busiest rank."""
    module: DenseWork
    """Tower modules of the busiest group of hosts: a rank runs them for P * B samples."""
    work: ModelWork
    """All dense parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLoad:
    """The flat model on a cluster, with tables spread perfectly over all ranks."""

    indices: Exchange
    """Ids to the ranks of their tables."""
    embeddings: Exchange
    """Pooled embeddings to the ranks of their samples, in float32."""
    lookup: Lookup
    """Of every rank."""
    work: ModelWork
    """All dense parts."""


def flat_load(model: DmtSpec, traffic: Traffic, ids_per_bag: float) -> FlatLoad:
    """Describe the flat model of a converted one.

    Args:
        model: The converted model.
        traffic: Its exchanges, which hold the flat ones.
        ids_per_bag: Mean number of ids per sample and feature.
    """
    bare = as_passthrough(model)
    rows, pooled = _flat_bytes(model.flat, ids_per_bag)
    return FlatLoad(
        indices=traffic.flat_indices,
        embeddings=traffic.flat_embeddings,
        lookup=Lookup(row_bytes=rows, pooled_bytes=pooled),
        work=count_work(bare),
    )


def planned_load(model: DmtSpec, plan: TowerPlan, ids_per_bag: float) -> TowerLoad:
    """Describe a model on the ranks that a plan gives it, as uneven as that is.

    Args:
        model: The converted model; with its passthrough twin this gives SPTT alone.
        plan: Where its tables lie.
        ids_per_bag: Mean number of ids per sample and feature.
    """
    ids = dict.fromkeys(model.flat.feature_names, ids_per_bag)
    towers = tower_loads(model.flat, model.assignment, ids)
    loads = {table.name: table for tables in towers for table in tables}
    placed = {placement.table: placement for placement in plan.tables}
    world = plan.cluster.world_size
    _, rank_ids, rank_widths = measure_ranks(loads, placed, world)
    work = count_work(model)
    group_of = {hosts: i for i, hosts in enumerate(sorted(set(plan.tower_hosts)))}
    groups = [_Group() for _ in group_of]
    for hosts, tables, width, module in zip(
        plan.tower_hosts, towers, model.tower_widths, work.towers, strict=True
    ):
        groups[group_of[hosts]].add(tables, width, module)
    return TowerLoad(
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
            row_bytes=world * max(_rank_row_bytes(loads, plan)),
            pooled_bytes=float(world * max(rank_widths) * ELEMENT_BYTES),
        ),
        module=max((group.work for group in groups), key=lambda work: work.flops),
        work=work,
    )


def even_load(model: DmtSpec, cluster: Cluster, ids_per_bag: float) -> TowerLoad:
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
    return TowerLoad(
        groups=groups,
        group_hosts=hosts,
        traffic=_even_traffic(cluster, groups, sum(model.tower_widths), width, ids),
        lookup=Lookup(row_bytes=rows, pooled_bytes=pooled),
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
    towers = tuple(TowerSpec(features=tower.features, module=bare) for tower in model.towers)
    return DmtSpec(flat=model.flat, towers=towers)


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
