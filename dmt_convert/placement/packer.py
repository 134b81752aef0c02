"""Placing towers on hosts and tables on ranks.

Letters: T towers, H hosts, R ranks per host, K_t vectors of D elements that tower t emits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from dmt_convert.errors import PlanError
from dmt_convert.placement.cluster import HBM_RESERVE, Cluster, show_bytes
from dmt_convert.placement.host_packing import Loads, TableLoad, pack_tables, spread_towers
from dmt_convert.placement.placement import TablePlacement
from dmt_convert.placement.tower_plan import TowerPlan, shorten
from dmt_convert.placement.traffic import measure_traffic
from dmt_convert.spec import DTYPE_BYTES, ModelSpec, TowerAssignment

_log = logging.getLogger(__name__)


def plan_towers(
    spec: ModelSpec,
    assignment: TowerAssignment,
    cluster: Cluster,
    *,
    tower_widths: Sequence[int],
    ids_per_bag: Mapping[str, float] | None = None,
) -> TowerPlan:
    """Place every tower inside a host and every table on the ranks of its tower.

    T = H: tower t lies on host t. T > H: several towers share a host, balanced by bytes,
    lookups and output width. T < H: every tower lies on H / T consecutive hosts. The same input
    always gives the same plan.

    Args:
        spec: The flat model.
        assignment: Its features by tower.
        cluster: Where it shall run.
        tower_widths: Elements that each tower emits per sample, K_t * D.
        ids_per_bag: Mean number of ids per sample of each feature; 1 where it is not named.

    Raises:
        PartitionError: The towers do not hold the model's features.
        PlanError: The towers share a table, T < H does not divide H, or memory is too small.
    """
    assignment.check_covers(spec.feature_names)
    num_towers = len(assignment.towers)
    _check_request(num_towers, cluster, tower_widths)
    towers = tower_loads(spec, assignment, ids_per_bag or {})
    tower_hosts = _place_towers(towers, tower_widths, cluster)
    groups: dict[tuple[int, ...], list[TableLoad]] = {}
    for hosts, tables in zip(tower_hosts, towers, strict=True):
        groups.setdefault(hosts, []).extend(tables)
    placed = _pack_groups(groups, cluster, num_towers)
    return _assemble(spec, towers, tower_hosts, placed, cluster, tower_widths)


def _check_request(num_towers: int, cluster: Cluster, tower_widths: Sequence[int]) -> None:
    if len(tower_widths) != num_towers or min(tower_widths, default=0) < 1:
        raise PlanError(
            f"tower widths {list(tower_widths)} for {num_towers} towers",
            expected="one positive number of elements per tower",
            hint="give what each tower module emits per sample",
        )
    if num_towers < cluster.hosts and cluster.hosts % num_towers:
        below = cluster.hosts // num_towers * num_towers
        raise PlanError(
            f"{num_towers} towers on {cluster.hosts} hosts",
            expected="a number of hosts that is a multiple of the towers, or fewer than them",
            hint=f"use {below} or {below + num_towers} hosts, or --towers {cluster.hosts}",
        )


def tower_loads(
    spec: ModelSpec, assignment: TowerAssignment, ids_per_bag: Mapping[str, float]
) -> list[list[TableLoad]]:
    """Return the tables of every tower, in the model's order.

    Raises:
        PlanError: A table serves features of several towers, or an id count is no count.
    """
    unknown = sorted(set(ids_per_bag) - set(spec.feature_names))
    wrong = [n for n, ids in ids_per_bag.items() if not (math.isfinite(ids) and ids > 0)]
    if unknown or wrong:
        raise PlanError(
            f"ids per bag of unknown features {unknown}, no positive number for {wrong}",
            expected="a positive mean number of ids for features of the model",
            hint="leave out features that the data does not hold",
        )
    tower_of = assignment.tower_of
    users: dict[str, list[str]] = {}
    for feature in spec.features:
        users.setdefault(feature.table, []).append(feature.name)
    split = {t: fs for t, fs in users.items() if len({tower_of[f] for f in fs}) > 1}
    if split:
        features = next(iter(split.values()))
        raise PlanError(
            f"{len(split)} table(s) serve features of several towers",
            expected="all features of a shared table in one tower, for a table is placed once",
            hint=f"keep them together, such as --together {','.join(features[:8])}",
            details=shorten(
                [
                    f"{table}: " + ", ".join(f"{f} in tower {tower_of[f]}" for f in features)
                    for table, features in split.items()
                ]
            ),
        )
    towers: list[list[TableLoad]] = [[] for _ in assignment.towers]
    for table_spec in spec.tables:
        features = users[table_spec.name]
        tower = tower_of[features[0]]
        towers[tower].append(
            TableLoad(
                name=table_spec.name,
                tower=tower,
                rows=table_spec.rows,
                dim=table_spec.dim,
                element_bytes=DTYPE_BYTES[table_spec.dtype],
                num_features=len(features),
                ids=math.fsum(ids_per_bag.get(name, 1.0) for name in features),
            )
        )
    return towers


def _place_towers(
    towers: Sequence[Sequence[TableLoad]], tower_widths: Sequence[int], cluster: Cluster
) -> list[tuple[int, ...]]:
    if len(towers) <= cluster.hosts:
        k = cluster.hosts // len(towers)
        return [tuple(range(t * k, (t + 1) * k)) for t in range(len(towers))]
    loads: Loads = np.array(
        [
            [
                sum(table.nbytes() for table in tables),
                math.fsum(table.ids for table in tables),
                width,
            ]
            for tables, width in zip(towers, tower_widths, strict=True)
        ],
        dtype=np.float64,
    )
    limit = float(cluster.usable_bytes * cluster.ranks_per_host)
    hosts = spread_towers(loads, cluster.hosts, limit)
    if any(a > b for a, b in pairwise(hosts)):
        _log.info("towers are not in the order of their hosts: outputs follow tower_order")
    return [(host,) for host in hosts]


def _pack_groups(
    groups: Mapping[tuple[int, ...], Sequence[TableLoad]], cluster: Cluster, num_towers: int
) -> dict[str, TablePlacement]:
    size, limit = cluster.ranks_per_host, cluster.usable_bytes
    placed: dict[str, TablePlacement] = {}
    failed: dict[tuple[int, ...], Sequence[TableLoad]] = {}
    for hosts, tables in groups.items():
        ranks = range(hosts[0] * size, (hosts[-1] + 1) * size)
        fits = sum(table.nbytes() for table in tables) <= limit * len(ranks)
        placements = pack_tables(tables, ranks, limit) if fits else None
        if placements is None:
            failed[hosts] = tables
        else:
            placed.update((placement.table, placement) for placement in placements)
    if failed:
        _refuse(groups, failed, cluster, num_towers)
    return placed


def _refuse(
    groups: Mapping[tuple[int, ...], Sequence[TableLoad]],
    failed: Mapping[tuple[int, ...], Sequence[TableLoad]],
    cluster: Cluster,
    num_towers: int,
) -> None:
    """Raise with the numbers of every group of hosts whose tables do not fit."""
    per_host = cluster.usable_bytes * cluster.ranks_per_host
    sizes = {hosts: sum(table.nbytes() for table in tables) for hosts, tables in groups.items()}
    by_tower: dict[int, int] = {}
    for tables in groups.values():
        for table in tables:
            by_tower[table.tower] = by_tower.get(table.tower, 0) + table.nbytes()
    # The least number of hosts by bytes alone: several towers a host, or several hosts a tower.
    needed = max(
        math.ceil(sum(sizes.values()) / per_host),
        num_towers * math.ceil(max(by_tower.values()) / per_host)
        if max(by_tower.values()) > per_host
        else 1,
    )
    hosts_hint = f"use {needed} hosts or more" if needed > cluster.hosts else "use more hosts"
    details = [
        f"tower {_listed(sorted({t.tower for t in tables}))} on host {_listed(hosts)}: "
        f"{show_bytes(sizes[hosts])} for {show_bytes(len(hosts) * per_host)}, "
        f"largest table {max(tables, key=TableLoad.nbytes).name!r} of "
        f"{show_bytes(max(t.nbytes() for t in tables))}"
        for hosts, tables in failed.items()
    ]
    raise PlanError(
        f"tables and row-wise Adagrad state take {show_bytes(sum(sizes.values()))}, and "
        f"{len(failed)} of {len(groups)} groups of hosts cannot hold theirs",
        expected=f"at most {show_bytes(per_host)} per host ({cluster.ranks_per_host} ranks of "
        f"{show_bytes(cluster.hbm_bytes)}, {HBM_RESERVE:.0%} kept for all but tables), "
        f"{show_bytes(cluster.hosts * per_host)} on {cluster.hosts} hosts",
        hint=f"{hosts_hint}, --dtype fp16, or fewer features per tower (raise --towers)",
        details=shorten(details),
    )


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > 8:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]} ({len(numbers)})"
    return ", ".join(map(str, numbers))


def _assemble(
    spec: ModelSpec,
    towers: Sequence[Sequence[TableLoad]],
    tower_hosts: Sequence[tuple[int, ...]],
    placed: Mapping[str, TablePlacement],
    cluster: Cluster,
    tower_widths: Sequence[int],
) -> TowerPlan:
    loads = {table.name: table for tables in towers for table in tables}
    rank_bytes, rank_ids, rank_widths = measure_ranks(loads, placed, cluster.world_size)
    group_of = {hosts: i for i, hosts in enumerate(sorted(set(tower_hosts)))}
    group_widths = [0] * len(group_of)
    group_ids = [0.0] * len(group_of)
    for hosts, tables, width in zip(tower_hosts, towers, tower_widths, strict=True):
        group_widths[group_of[hosts]] += width
        group_ids[group_of[hosts]] += math.fsum(table.ids for table in tables)
    return TowerPlan(
        cluster=cluster,
        tower_hosts=tuple(tower_hosts),
        tables=tuple(placed[table.name] for table in spec.tables),
        bytes_per_rank=tuple(rank_bytes),
        lookups_per_rank=tuple(rank_ids),
        traffic=measure_traffic(
            cluster,
            group_hosts=len(tower_hosts[0]),
            group_widths=group_widths,
            rank_widths=rank_widths,
            rank_ids=rank_ids,
            flat_width=sum(spec.feature_dims),
            ids=group_ids,
        ),
    )


def measure_ranks(
    loads: Mapping[str, TableLoad], placed: Mapping[str, TablePlacement], world_size: int
) -> tuple[list[int], list[float], list[int]]:
    """Sum what every rank holds.

    Returns:
        Per rank: bytes with optimizer state, ids looked up per sample, pooled elements per
        sample (a row-wise shard yields partial sums of the full width).
    """
    sizes, ids, widths = [0] * world_size, [0.0] * world_size, [0] * world_size
    for name, placement in placed.items():
        load = loads[name]
        row_wise = placement.sharding_type == "table_row_wise"
        for shard in placement.shards:
            sizes[shard.rank] += shard.nbytes(load.element_bytes)
            ids[shard.rank] += load.ids / len(placement.shards) if row_wise else load.ids
            widths[shard.rank] += shard.cols * load.num_features
    return sizes, ids, widths
