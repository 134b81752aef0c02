"""Longest-processing-time packing: towers onto hosts, tables onto the ranks of a host.

Letters: L ranks that the tables of one group of hosts may use, N embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.placement.placement import (
    COLS_MULTIPLE,
    OPTIMIZER_BYTES_PER_ROW,
    Shard,
    TablePlacement,
    padded_dim,
    row_blocks,
)

Loads = npt.NDArray[np.float64]

MIN_SHARD_COLS: Final = 32
"""Narrower column shards waste the accelerator's memory transactions."""

DOMINANCE: Final = 2.0
"""A table of this many times the mean bytes per rank is cut into columns to balance memory..."""
DOMINANCE_FLOOR: Final = 1 / 16
"""...where it also takes this share of a rank's usable memory. Below that an uneven host costs
nothing, and every column shard costs one more copy of the ids."""

IN_A_ROW_TOLERANCE: Final = np.array([1.5, 1.1, 1.1])
"""How much more the busiest host may hold (bytes, ids, elements emitted) for the sake of towers
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
    element_bytes: int
    """Size of one element, in bytes."""
    num_features: int
    """Features that are looked up in it."""
    ids: float
    """Ids looked up per sample, of all those features."""

    def nbytes(self, column_shards: int = 1) -> int:
        """Size in memory with optimizer state when cut into so many column shards, in bytes."""
        state = OPTIMIZER_BYTES_PER_ROW * column_shards
        return self.rows * (padded_dim(self.dim) * self.element_bytes + state)

    @property
    def loads(self) -> tuple[float, float, float]:
        """Bytes, ids per sample, pooled elements per sample."""
        return (float(self.nbytes()), self.ids, float(self.dim * self.num_features))


class Bins:
    """Bins with several kinds of load, filled one item after the other."""

    def __init__(self, count: int, loads: Loads, limit: float) -> None:
        """Make empty bins.

        Args:
            count: Number of bins.
            loads: Of all items to come, shape (items, kinds); only their means are used.
            limit: What a bin holds of the first kind.
        """
        self.used: Loads = np.zeros((count, loads.shape[1]))
        self._mean = np.maximum(loads.sum(axis=0) / count, 1e-300)
        if np.isfinite(limit):  # bytes that are few beside the memory cost no time
            self._mean[0] = max(self._mean[0], DOMINANCE_FLOOR * limit)
        self._limit = limit

    def scores(self, item: Loads) -> Loads:
        """Return each bin's greatest load over the mean of its kind, were the item in it.

        A bin that the item does not fit into scores inf.
        """
        after = self.used + item
        scores: Loads = (after / self._mean).max(axis=1)
        scores[after[:, 0] > self._limit] = np.inf
        return scores

    def best(self, item: Loads, count: int = 1) -> list[int] | None:
        """Return the `count` bins that the item burdens least, or None where it fits fewer."""
        scores = self.scores(item)
        chosen = np.argsort(scores, kind="stable")[:count]
        return [int(i) for i in chosen] if np.isfinite(scores[chosen]).all() else None

    def add(self, bin_index: int, item: Loads) -> None:
        """Put an item into a bin."""
        self.used[bin_index] += item


def longest_first(loads: Loads) -> list[int]:
    """Return item indices by descending share of whichever load they weigh most in."""
    shares = (loads / np.maximum(loads.sum(axis=0), 1e-300)).max(axis=1)
    return [int(i) for i in np.argsort(-shares, kind="stable")]


def spread_towers(loads: Loads, hosts: int, limit: float) -> tuple[int, ...]:
    """Put at least as many towers as hosts onto hosts, every host with one at least.

    Towers in a row share a host where that is nearly as even as any other choice: then the
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


def _peaks(loads: Loads, host_of: Sequence[int], hosts: int) -> Loads:
    """Return the load of the busiest host, per kind."""
    used = np.zeros((hosts, loads.shape[1]))
    np.add.at(used, np.asarray(host_of), loads)
    peaks: Loads = used.max(axis=0)
    return peaks


def _cut_in_a_row(loads: Loads, hosts: int, limit: float) -> tuple[int, ...] | None:
    """Cut towers into runs with the least peak, by bisection; None where one exceeds `limit`."""
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


def _greedy_cut(loads: Loads, hosts: int, caps: Loads) -> tuple[int, ...] | None:
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

    A table stays whole where it fits, is cut into columns where it does not or where it
    dominates the host, and into rows where that does not help. Where whole tables leave gaps
    that nothing fits into, ever more of the largest tables are cut into rows.

    Args:
        tables: All tables of the group's towers.
        ranks: The group's L global ranks, ascending.
        limit: What tables may use of one rank, in bytes.

    Returns:
        One placement per table in the order given, or None where they do not fit.
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
            table=table.name, tower=table.tower, sharding_type="table_column_wise", shards=shards
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
                shard.nbytes(table.element_bytes),
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
        table=table.name, tower=table.tower, sharding_type="table_row_wise", shards=shards
    )
