"""Placing towers on hosts and tables on ranks, the longest processing time first.

Letters: T towers, H hosts, R ranks per host, K_t vectors of D elements that tower t emits, L ranks
that the tables of one group of hosts may use, N embedding dim.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from dmt_convert.arrays import Float64Array
from dmt_convert.documents import shorten
from dmt_convert.errors import PlanError
from dmt_convert.model import DmtSpec
from dmt_convert.placement.cluster import HBM_RESERVE, Cluster, show_bytes
from dmt_convert.placement.table_memory import (
    CACHED_SHARE,
    COLS_MULTIPLE,
    TRAINED_BYTES,
    TableOptimizer,
    copy_bytes,
    shard_bytes,
)
from dmt_convert.placement.tower_plan import (
    Shard,
    TablePlacement,
    TowerPlan,
    row_blocks,
)
from dmt_convert.placement.traffic import measure_traffic
from dmt_convert.spec import ModelSpec, TowerAssignment

_log = logging.getLogger(__name__)

MIN_SHARD_COLS: Final = 32
"""Narrower column shards waste the accelerator's memory transactions."""

DOMINANCE: Final = 2.0
"""A table of this many times the mean bytes per rank is cut into columns to balance memory..."""
DOMINANCE_FLOOR: Final = 1 / 16
"""...if it also takes this share of a rank's usable memory. Below that an uneven host costs
nothing, and every column shard costs one more copy of the ids."""

IN_A_ROW_TOLERANCE: Final = np.array([1.5, 1.1, 1.1])
"""How much more the busiest host may hold (bytes, ids, bytes sent) for the sake of towers
that stand in the order of their hosts. Bytes that fit cost nothing; the rest costs time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLoad:
    """What a table asks of the ranks that hold it."""

    name: str
    """Table name."""
    tower: int
    """Index of its tower."""
    rows: int
    """Number of rows."""
    dim: int
    """N."""
    num_features: int
    """Features that are looked up in it."""
    ids: float
    """Ids looked up per sample, of all those features."""
    optimizer: TableOptimizer = "rowwise_adagrad"
    """What moves it."""
    cached: float | None = None
    """Share of its rows that the accelerator keeps; None: it has the whole table."""
    element_bytes: int = TRAINED_BYTES
    """Size of one element, in bytes."""

    def shard_bytes(self, rows: int, cols: int) -> int:
        """Size in memory of a part of it, in bytes, with optimizer state."""
        return shard_bytes(
            rows,
            cols,
            optimizer=self.optimizer,
            cached=self.cached,
            element_bytes=self.element_bytes,
        )

    def nbytes(self, column_shards: int = 1) -> int:
        """Size in memory in bytes, with optimizer state, as that number of column shards."""
        if column_shards == 1:
            return self.shard_bytes(self.rows, self.dim)
        return column_shards * self.shard_bytes(self.rows, self.dim // column_shards)

    @property
    def kernel(self) -> Literal["fused", "fused_uvm_caching"]:
        """TorchRec's kernel for it."""
        return "fused" if self.cached is None else "fused_uvm_caching"

    @property
    def everywhere_bytes(self) -> int:
        """Size in bytes on every rank: the whole table, its whole gradient, optimizer state."""
        return copy_bytes(
            self.rows, self.dim, optimizer=self.optimizer, element_bytes=self.element_bytes
        )

    @property
    def loads(self) -> tuple[float, float, float]:
        """Bytes, ids per sample, pooled elements per sample."""
        return (float(self.nbytes()), self.ids, float(self.dim * self.num_features))


class Bins:
    """Bins with several kinds of load, filled one item after the other."""

    def __init__(self, count: int, loads: Float64Array, limit: float) -> None:
        """Make empty bins.

        Args:
            count: Number of bins.
            loads: Of all items to come, shape (items, kinds); only their means are used.
            limit: What a bin holds of the first kind.
        """
        self.used: Float64Array = np.zeros((count, loads.shape[1]))
        self._mean = np.maximum(loads.sum(axis=0) / count, 1e-300)
        if np.isfinite(limit):  # bytes cost no time while memory is plentiful
            self._mean[0] = max(self._mean[0], DOMINANCE_FLOOR * limit)
        self._limit = limit

    def scores(self, item: Float64Array) -> Float64Array:
        """Return each bin's greatest load over the mean of its kind, were the item in it.

        A bin that the item does not fit into scores inf.
        """
        after = self.used + item
        scores: Float64Array = (after / self._mean).max(axis=1)
        scores[after[:, 0] > self._limit] = np.inf
        return scores

    def best(self, item: Float64Array, count: int = 1) -> list[int] | None:
        """Return the `count` bins that the item burdens least; None if it fits into fewer."""
        scores = self.scores(item)
        chosen = np.argsort(scores, kind="stable")[:count]
        return [int(i) for i in chosen] if np.isfinite(scores[chosen]).all() else None

    def add(self, bin_index: int, item: Float64Array) -> None:
        """Put an item into a bin."""
        self.used[bin_index] += item


def longest_first(loads: Float64Array) -> list[int]:
    """Return item indices by descending share of whichever load they weigh most in."""
    shares = (loads / np.maximum(loads.sum(axis=0), 1e-300)).max(axis=1)
    return [int(i) for i in np.argsort(-shares, kind="stable")]


def spread_towers(loads: Float64Array, hosts: int, limit: float) -> tuple[int, ...]:
    """Put at least as many towers as hosts onto hosts, every host with one at least.

    Neighbouring towers share a host if that is nearly as even as any other choice: then the
    order of TorchRec's outputs is the order of the towers.

    Args:
        loads: Of every tower, shape (T, kinds); the first kind is bytes.
        hosts: H, at most T.
        limit: What the tables of one host may use, in bytes.

    Returns:
        The host of every tower.
    """
    in_a_row = _cut_in_a_row(loads, hosts, limit)
    bins = Bins(hosts, loads, limit)
    free = Bins(hosts, loads, np.inf)
    chosen = [0] * len(loads)
    for item in longest_first(loads):
        free.used = bins.used
        best = bins.best(loads[item]) or free.best(loads[item])
        assert best is not None
        chosen[item] = best[0]
        bins.add(best[0], loads[item])
    if in_a_row is None:
        return tuple(chosen)
    nearly = _peaks(loads, in_a_row, hosts) <= IN_A_ROW_TOLERANCE * _peaks(loads, chosen, hosts)
    return in_a_row if nearly.all() else tuple(chosen)


def _peaks(loads: Float64Array, host_of: Sequence[int], hosts: int) -> Float64Array:
    """Return the load of the busiest host, per kind."""
    used = np.zeros((hosts, loads.shape[1]))
    np.add.at(used, np.asarray(host_of), loads)
    peaks: Float64Array = used.max(axis=0)
    return peaks


def _cut_in_a_row(loads: Float64Array, hosts: int, limit: float) -> tuple[int, ...] | None:
    """Cut towers into runs with the least peak, by bisection; None if one exceeds `limit`."""
    mean = np.maximum(loads.sum(axis=0) / hosts, 1e-300)
    low, high = 0.0, float(len(loads) * hosts)
    best: tuple[int, ...] | None = None
    for _ in range(50):
        cap = (low + high) / 2
        cut = _greedy_cut(
            loads, hosts, np.minimum(mean * cap, [limit] + [np.inf] * (len(mean) - 1))
        )
        if cut is None:
            low = cap
        else:
            best, high = cut, cap
    return best


def _greedy_cut(loads: Float64Array, hosts: int, caps: Float64Array) -> tuple[int, ...] | None:
    host, used = 0, np.zeros(loads.shape[1])
    host_of = []
    for item, load in enumerate(loads):
        must_move = item > 0 and len(loads) - item <= hosts - 1 - host
        if item and (must_move or ((used + load) > caps).any()):
            host, used = host + 1, np.zeros(loads.shape[1])
        used = used + load
        if host >= hosts or (used > caps).any():
            return None
        host_of.append(host)
    return tuple(host_of)


def pack_tables(
    tables: Sequence[TableLoad], ranks: Sequence[int], limit: int
) -> list[TablePlacement] | None:
    """Put the tables of one group of hosts onto its ranks.

    A table stays whole if it fits. It is cut into columns if it does not fit or dominates the
    host, and into rows if columns do not help. If whole tables leave gaps that no other table
    fits into, more and more of the largest tables are cut into rows.

    Args:
        tables: All tables of the group's towers.
        ranks: The group's L global ranks, ascending.
        limit: What tables may use of one rank, in bytes.

    Returns:
        One placement per table in the order given; None if they do not fit.
    """
    largest = sorted(range(len(tables)), key=lambda i: -tables[i].nbytes())
    in_rows = 0
    while True:
        placements = _try_pack(tables, ranks, limit, frozenset(largest[:in_rows]))
        if placements is not None or in_rows >= len(tables):
            return placements
        in_rows = max(1, 2 * in_rows)


def _try_pack(
    tables: Sequence[TableLoad], ranks: Sequence[int], limit: int, in_rows: frozenset[int]
) -> list[TablePlacement] | None:
    loads = np.array([table.loads for table in tables])
    bins = Bins(len(ranks), loads, float(limit))
    mean_bytes = float(loads[:, 0].sum()) / len(ranks)
    order = longest_first(loads)
    placed: dict[int, TablePlacement] = {}
    for index in sorted(order, key=lambda i: i not in in_rows):
        table = tables[index]
        placement = None
        if index not in in_rows:
            placement = _place_columns(table, bins, ranks, limit, mean_bytes)
        placement = placement or _place_rows(table, bins, ranks, limit)
        if placement is None:
            return None
        placed[index] = placement
    return [placed[index] for index in range(len(tables))]


def column_cuts(dim: int, num_ranks: int) -> list[int]:
    """Numbers of column shards that a table of this dim may be cut into, 1 first."""
    cuts = (n for n in range(2, num_ranks + 1) if dim % n == 0)
    allowed = (n for n in cuts if dim // n >= MIN_SHARD_COLS and dim // n % COLS_MULTIPLE == 0)
    return [1, *allowed]


def _place_columns(
    table: TableLoad, bins: Bins, ranks: Sequence[int], limit: int, mean_bytes: float
) -> TablePlacement | None:
    cuts = column_cuts(table.dim, len(ranks))
    share = max(DOMINANCE * mean_bytes, DOMINANCE_FLOOR * limit)
    even = [n for n in cuts if table.nbytes(n) / n <= share]
    # The first cut that is even enough and fits; else any that fits, the coarsest first.
    for count in [*even, *(n for n in cuts if n not in even)]:
        cols = table.dim // count
        item = np.array([table.nbytes(count) / count, table.ids, float(cols * table.num_features)])
        chosen = bins.best(item, count)
        if chosen is None:
            continue
        for bin_index in chosen:
            bins.add(bin_index, item)
        shards = tuple(
            Shard(rank=ranks[b], row_offset=0, col_offset=i * cols, rows=table.rows, cols=cols)
            for i, b in enumerate(sorted(chosen))
        )
        return TablePlacement(
            table=table.name,
            tower=table.tower,
            sharding_type="table_column_wise",
            compute_kernel=table.kernel,
            cached=table.cached,
            shards=shards,
        )
    return None


def _place_rows(
    table: TableLoad, bins: Bins, ranks: Sequence[int], limit: int
) -> TablePlacement | None:
    shards = tuple(
        Shard(rank=rank, row_offset=offset, col_offset=0, rows=rows, cols=table.dim)
        for rank, (offset, rows) in zip(ranks, row_blocks(table.rows, len(ranks)), strict=True)
    )
    items = np.array(
        [
            [
                table.shard_bytes(shard.rows, shard.cols),
                table.ids / len(ranks),
                table.dim * table.num_features,
            ]
            for shard in shards
        ]
    )
    if (bins.used[:, 0] + items[:, 0] > limit).any():
        return None
    bins.used += items
    return TablePlacement(
        table=table.name,
        tower=table.tower,
        sharding_type="table_row_wise",
        compute_kernel=table.kernel,
        cached=table.cached,
        shards=shards,
    )


def plan_towers(
    spec: ModelSpec,
    assignment: TowerAssignment,
    cluster: Cluster,
    *,
    tower_bytes: Sequence[int],
    gradient_bytes: Sequence[int] | None = None,
    ids_per_bag: Mapping[str, float] | None = None,
    everywhere: Sequence[int] = (),
    optimizer: TableOptimizer = "rowwise_adagrad",
    cached_shares: Mapping[str, float] | None = None,
    host_memory: bool = True,
) -> TowerPlan:
    """Place every tower inside a host and every table on the ranks of its tower.

    T = H: tower t lies on host t. T > H: several towers share a host, balanced by bytes,
    lookups and what they send. T < H: every tower lies on H / T consecutive hosts. The same input
    always gives the same plan.

    Args:
        spec: The flat model.
        assignment: Its features by tower.
        cluster: Where it shall run.
        tower_bytes: Bytes that each tower sends per sample.
        gradient_bytes: Bytes of the gradients that come back to each; None: as many.
        ids_per_bag: Mean number of ids per sample of each feature; 1 if it is not named.
        everywhere: Towers whose tables lie whole on every rank, and on no host in particular; the
            T towers above are the others.
        optimizer: What moves the tables; its state takes memory.
        cached_shares: Table -> the share of its rows that an accelerator keeps if the table is too
            large for it, from `cached_share`; `CACHED_SHARE` if it is not named.
        host_memory: Whether what is too large may lie in the memory of hosts.

    Raises:
        PartitionError: The towers do not hold the model's features.
        PlanError: The towers share a table, T < H does not divide H, or memory is too small.
    """
    assignment.check_covers(spec.feature_names)
    sending = [t for t in range(len(assignment.towers)) if t not in set(everywhere)]
    sent = _pair_bytes(tower_bytes, gradient_bytes, len(assignment.towers), sending)
    _check_hosts(len(sending), cluster)
    towers = tower_loads(spec, assignment, ids_per_bag or {}, optimizer=optimizer)
    resident = [table for t in everywhere for table in towers[t]]
    room = _room_beside(resident, cluster)
    tower_hosts: list[tuple[int, ...]] = [()] * len(towers)
    found = _place_towers([towers[t] for t in sending], [sent[t] for t in sending], cluster, room)
    groups: dict[tuple[int, ...], list[TableLoad]] = {}
    for tower, hosts in zip(sending, found, strict=True):
        tower_hosts[tower] = hosts
        groups.setdefault(hosts, []).extend(towers[tower])
    shares = (cached_shares or {}) if host_memory else None
    placed = _pack_groups(groups, cluster, room, len(sending), shares)
    placed |= {table.name: _place_everywhere(table) for table in resident}
    return _assemble(spec, towers, tower_hosts, placed, cluster, sent, optimizer)


def plan_model(
    model: DmtSpec,
    cluster: Cluster,
    *,
    ids_per_bag: Mapping[str, float] | None = None,
    optimizer: TableOptimizer = "rowwise_adagrad",
    cached_shares: Mapping[str, float] | None = None,
    host_memory: bool = True,
) -> TowerPlan:
    """Place a converted model's towers; see `plan_towers`."""
    return plan_towers(
        model.flat,
        model.assignment,
        cluster,
        tower_bytes=model.tower_bytes,
        gradient_bytes=model.gradient_bytes(),
        ids_per_bag=ids_per_bag,
        optimizer=optimizer,
        cached_shares=cached_shares,
        host_memory=host_memory,
        everywhere=[t for t, tower in enumerate(model.towers) if tower.everywhere],
    )


def _room_beside(resident: Sequence[TableLoad], cluster: Cluster) -> int:
    """Return the bytes of a rank that are left beside the tables that every rank holds.

    Raises:
        PlanError: Nothing is left.
    """
    taken = sum(table.everywhere_bytes for table in resident)
    if taken < cluster.usable_bytes:
        return cluster.usable_bytes - taken
    raise PlanError(
        f"{len(resident)} tables on every rank take {show_bytes(taken)} of it, with their "
        "gradients and optimizer state",
        expected=f"less than the {show_bytes(cluster.usable_bytes)} that tables may use of a rank",
        hint="replicate fewer tables: `dmt convert --replicate ROWS` with fewer rows",
    )


def _place_everywhere(table: TableLoad) -> TablePlacement:
    whole = Shard(rank=0, row_offset=0, col_offset=0, rows=table.rows, cols=table.dim)
    return TablePlacement(
        table=table.name,
        tower=table.tower,
        sharding_type="data_parallel",
        compute_kernel="dense",
        shards=(whole,),
    )


def _pair_bytes(
    tower_bytes: Sequence[int],
    gradient_bytes: Sequence[int] | None,
    num_towers: int,
    sending: Sequence[int],
) -> list[tuple[int, int]]:
    """Return every tower's bytes, there and back.

    Raises:
        PlanError: There is not one number per tower, or a tower that sends has no bytes.
    """
    back = tower_bytes if gradient_bytes is None else gradient_bytes
    for found in (tower_bytes, back):
        if len(found) != num_towers or min((found[t] for t in sending), default=0) < 1:
            raise PlanError(
                f"{list(found)} bytes per sample for {num_towers} towers",
                expected="one positive number of bytes per tower",
                hint="give what each tower module sends per sample",
            )
    return list(zip(tower_bytes, back, strict=True))


def _check_hosts(num_towers: int, cluster: Cluster) -> None:
    if num_towers < cluster.hosts and cluster.hosts % num_towers:
        below = cluster.hosts // num_towers * num_towers
        raise PlanError(
            f"{num_towers} towers on {cluster.hosts} hosts",
            expected="a number of hosts that is a multiple of the towers, or fewer than them",
            hint=f"use {below} or {below + num_towers} hosts, or --towers {cluster.hosts}",
        )


def tower_loads(
    spec: ModelSpec,
    assignment: TowerAssignment,
    ids_per_bag: Mapping[str, float],
    *,
    optimizer: TableOptimizer = "rowwise_adagrad",
) -> list[list[TableLoad]]:
    """Return the tables of every tower, in the model's order, as they are trained.

    Raises:
        PlanError: A table serves features of several towers, or an id count is not positive.
    """
    unknown = sorted(set(ids_per_bag) - set(spec.feature_names))
    wrong = [n for n, ids in ids_per_bag.items() if not (math.isfinite(ids) and ids > 0)]
    if unknown or wrong:
        raise PlanError(
            f"ids per bag of unknown features {unknown}, not positive for {wrong}",
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
            expected="all features of a shared table in one tower, because a table is placed once",
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
                optimizer=optimizer,
                num_features=len(features),
                ids=math.fsum(ids_per_bag.get(name, 1.0) for name in features),
            )
        )
    return towers


def _place_towers(
    towers: Sequence[Sequence[TableLoad]],
    sent: Sequence[tuple[int, int]],
    cluster: Cluster,
    room: int,
) -> list[tuple[int, ...]]:
    if len(towers) <= cluster.hosts:
        k = cluster.hosts // len(towers)
        return [tuple(range(t * k, (t + 1) * k)) for t in range(len(towers))]
    loads: Float64Array = np.array(
        [
            [
                sum(table.nbytes() for table in tables),
                math.fsum(table.ids for table in tables),
                sum(both_ways),
            ]
            for tables, both_ways in zip(towers, sent, strict=True)
        ],
        dtype=np.float64,
    )
    limit = float(room * cluster.ranks_per_host)
    hosts = spread_towers(loads, cluster.hosts, limit)
    if any(a > b for a, b in pairwise(hosts)):
        _log.info("towers are not in the order of their hosts: outputs follow tower_order")
    return [(host,) for host in hosts]


def _pack_groups(
    groups: Mapping[tuple[int, ...], Sequence[TableLoad]],
    cluster: Cluster,
    limit: int,
    num_towers: int,
    cached_shares: Mapping[str, float] | None,
) -> dict[str, TablePlacement]:
    size = cluster.ranks_per_host
    placed: dict[str, TablePlacement] = {}
    failed: dict[tuple[int, ...], Sequence[TableLoad]] = {}
    for hosts, tables in groups.items():
        ranks = range(hosts[0] * size, (hosts[-1] + 1) * size)
        fits = sum(table.nbytes() for table in tables) <= limit * len(ranks)
        placements = pack_tables(tables, ranks, limit) if fits else None
        if placements is None and cached_shares is not None:
            placements = _pack_with_cache(tables, ranks, limit, cached_shares)
        if placements is None:
            failed[hosts] = tables
        else:
            placed.update((placement.table, placement) for placement in placements)
    if failed:
        _refuse(groups, failed, cluster, limit, num_towers)
    return placed


def _pack_with_cache(
    tables: Sequence[TableLoad], ranks: Sequence[int], limit: int, shares: Mapping[str, float]
) -> list[TablePlacement] | None:
    """Put more and more of the largest tables into the hosts' memory until the others fit."""
    largest = sorted(range(len(tables)), key=lambda i: -tables[i].nbytes())
    count = 1
    while True:
        moved = set(largest[:count])
        tried = [
            replace(table, cached=shares.get(table.name, CACHED_SHARE)) if i in moved else table
            for i, table in enumerate(tables)
        ]
        fits = sum(table.nbytes() for table in tried) <= limit * len(ranks)
        placements = pack_tables(tried, ranks, limit) if fits else None
        if placements is not None or count >= len(tables):
            return placements
        count *= 2


def _refuse(
    groups: Mapping[tuple[int, ...], Sequence[TableLoad]],
    failed: Mapping[tuple[int, ...], Sequence[TableLoad]],
    cluster: Cluster,
    limit: int,
    num_towers: int,
) -> None:
    """Raise with the numbers of every group of hosts whose tables do not fit."""
    per_host = limit * cluster.ranks_per_host
    taken = cluster.usable_bytes - limit
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
    optimizer = next(iter(groups.values()))[0].optimizer
    raise PlanError(
        f"float32 tables and the state of {optimizer.replace('_', '-')} take "
        f"{show_bytes(sum(sizes.values()))}, and {len(failed)} of {len(groups)} groups of hosts "
        f"cannot hold theirs, nor the rows in use of tables in host memory",
        expected=f"at most {show_bytes(per_host)} per host ({cluster.ranks_per_host} ranks of "
        f"{show_bytes(cluster.hbm_bytes)}, {HBM_RESERVE:.0%} kept for all but tables"
        + (f", {show_bytes(taken)} for tables on every rank" if taken else "")
        + "), "
        f"{show_bytes(cluster.hosts * per_host)} on {cluster.hosts} hosts",
        hint=f"{hosts_hint}, or fewer features per tower (raise --towers); tables are trained as "
        "float32, whatever --dtype they are stored in",
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
    sent: Sequence[tuple[int, int]],
    optimizer: TableOptimizer,
) -> TowerPlan:
    loads = {table.name: table for tables in towers for table in tables}
    rank_bytes, rank_ids, rank_widths = measure_ranks(loads, placed, cluster.world_size)
    group_of = {hosts: i for i, hosts in enumerate(sorted({h for h in tower_hosts if h}))}
    group_bytes, gradient_bytes = [0] * len(group_of), [0] * len(group_of)
    group_ids = [0.0] * len(group_of)
    resident = [
        table
        for hosts, tables in zip(tower_hosts, towers, strict=True)
        if not hosts
        for table in tables
    ]
    held = sum(table.everywhere_bytes for table in resident)
    local_ids = math.fsum(table.ids for table in resident)
    for hosts, tables, (there, back) in zip(tower_hosts, towers, sent, strict=True):
        if not hosts:
            continue
        group_bytes[group_of[hosts]] += there
        gradient_bytes[group_of[hosts]] += back
        group_ids[group_of[hosts]] += math.fsum(table.ids for table in tables)
    return TowerPlan(
        cluster=cluster,
        tower_hosts=tuple(tower_hosts),
        tables=tuple(placed[table.name] for table in spec.tables),
        bytes_per_rank=tuple(size + held for size in rank_bytes),
        optimizer=optimizer,
        lookups_per_rank=tuple(ids + local_ids / cluster.world_size for ids in rank_ids),
        traffic=measure_traffic(
            cluster,
            group_hosts=max(map(len, tower_hosts)),
            group_bytes=group_bytes,
            gradient_bytes=gradient_bytes,
            rank_widths=rank_widths,
            rank_ids=rank_ids,
            flat_width=sum(spec.feature_dims),
            ids=group_ids,
            replicated_elements=sum(table.rows * table.dim for table in resident),
            replicated_ids=local_ids,
        ),
    )


def measure_ranks(
    loads: Mapping[str, TableLoad], placed: Mapping[str, TablePlacement], world_size: int
) -> tuple[list[int], list[float], list[int]]:
    """Sum what every rank holds of the tables that lie on some.

    Returns:
        Per rank: bytes with optimizer state, ids looked up per sample, pooled elements per
        sample (a row-wise shard yields partial sums of the full width).
    """
    sizes, ids, widths = [0] * world_size, [0.0] * world_size, [0] * world_size
    for name, placement in placed.items():
        load = replace(loads[name], cached=placement.cached)
        if placement.is_everywhere:
            continue
        row_wise = placement.sharding_type == "table_row_wise"
        for shard in placement.shards:
            sizes[shard.rank] += load.shard_bytes(shard.rows, shard.cols)
            ids[shard.rank] += load.ids / len(placement.shards) if row_wise else load.ids
            widths[shard.rank] += shard.cols * load.num_features
    return sizes, ids, widths
