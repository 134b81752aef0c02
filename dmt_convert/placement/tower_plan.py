"""Which host runs which tower, and which rank holds which part of which table: `plan.json`.

Letters: T towers, H hosts, R ranks per host, W = H * R world size, N embedding dim, L ranks of the
hosts that a tower lies on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, NonNegativeInt

from dmt_convert.documents import Layout, shorten, to_json
from dmt_convert.errors import PlanError
from dmt_convert.placement.cluster import Amount, Cluster, show_bytes
from dmt_convert.placement.table_memory import TableOptimizer
from dmt_convert.placement.traffic import CommunicationEstimate, Traffic

SCHEMA_VERSION: Final = 1
"""Raised when older versions would misread a plan; not for a key that they can ignore."""

ShardingType = Literal["table_row_wise", "table_column_wise", "data_parallel"]
ComputeKernel = Literal["fused", "fused_uvm_caching", "dense"]
"""TorchRec's kernel. fused looks up and updates all tables of a rank at once; fused_uvm_caching
does so with tables in the host's memory, of which the accelerator keeps the rows in use; dense
leaves the gradients of data-parallel tables to an optimizer, because they are first summed over the
ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A rectangle of a table on one rank."""

    rank: NonNegativeInt
    """Global rank that holds it."""
    row_offset: NonNegativeInt
    """First row."""
    col_offset: NonNegativeInt
    """First column."""
    rows: NonNegativeInt
    """Number of rows; 0 if a row-wise table has fewer rows than ranks."""
    cols: NonNegativeInt
    """Number of columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlacement:
    """One table, on the ranks of its tower."""

    table: str
    """Table name."""
    tower: NonNegativeInt
    """Index of the tower whose features are looked up in it."""
    sharding_type: ShardingType
    """table_row_wise: equal blocks of rows on every rank of the tower's hosts;
    table_column_wise: equal blocks of columns on some ranks (one block: the table is whole);
    data_parallel: whole on every rank, its tower sends nothing."""
    compute_kernel: ComputeKernel = "fused"
    """TorchRec's compute kernel."""
    cached: Annotated[float, Field(gt=0, le=1)] | None = None
    """fused_uvm_caching: the share of its rows that the accelerator keeps."""
    shards: tuple[Shard, ...]
    """All parts, by ascending offset; data_parallel: the whole table, which every rank holds, as
    if it were on rank 0 alone."""

    @property
    def is_everywhere(self) -> bool:
        """Whether every rank has the whole table."""
        return self.sharding_type == "data_parallel"

    @property
    def plain_kernel(self) -> Literal["fused", "dense"]:
        """The kernel of a table that lies in a rank's own memory."""
        return "dense" if self.is_everywhere else "fused"

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return max((shard.row_offset + shard.rows for shard in self.shards), default=0)

    @property
    def cols(self) -> int:
        """N, columns of the whole table."""
        return max((shard.col_offset + shard.cols for shard in self.shards), default=0)

    def problems(self, ranks: Sequence[int]) -> list[str]:
        """Say what keeps this from being a placement that TorchRec accepts.

        Args:
            ranks: The L ranks of the tower's hosts, ascending.

        Returns:
            One line per problem.
        """
        name = f"table {self.table!r}"
        if not self.shards:
            return [f"{name} has no shards"]
        problems = []
        kernel = self.plain_kernel if self.cached is None else "fused_uvm_caching"
        if self.compute_kernel != kernel or (self.is_everywhere and self.cached is not None):
            problems.append(f"{name} is {self.sharding_type} with kernel {self.compute_kernel!r}")
        if self.is_everywhere and [shard.rank for shard in self.shards] != [0]:
            problems.append(f"{name} is on every rank, but not as one whole table")
        row_wise = self.sharding_type == "table_row_wise"
        expected = row_blocks(self.rows, len(ranks)) if row_wise else self._column_blocks()
        found = [(s.row_offset, s.col_offset, s.rows, s.cols) for s in self.shards]
        wanted = [
            (offset, 0, size, self.cols) if row_wise else (0, offset, self.rows, size)
            for offset, size in expected
        ]
        if found != wanted or self.rows < 1 or self.cols < 1:
            problems.append(
                f"the {len(found)} shards of {name} do not tile its {self.rows} x {self.cols} "
                "elements in equal blocks"
            )
        mine = [shard.rank for shard in self.shards]
        outside = sorted(set(mine) - set(ranks))
        if outside:
            problems.append(f"{name} is on ranks {outside}, outside the hosts of its tower")
        elif row_wise and mine != list(ranks):
            problems.append(f"{name} is row-wise on ranks {mine}, not on {list(ranks)} in order")
        elif len(set(mine)) < len(mine):
            problems.append(f"{name} has two shards on one rank: {mine}")
        return problems

    def _column_blocks(self) -> list[tuple[int, int]]:
        width = self.cols // len(self.shards)
        return [(i * width, width) for i in range(len(self.shards))]


def row_blocks(rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """Cut rows into (offset, size) blocks, one per rank.

    Every block has ceil(rows / num_ranks) rows until none are left, so later blocks can be
    smaller or empty; TorchRec computes a row's rank from that block size.

    Source: `_calculate_rw_shard_sizes_and_offsets` in torchrec/distributed/sharding_plan.py.
    """
    block = -(-rows // num_ranks)
    starts = [min(i * block, rows) for i in range(num_ranks + 1)]
    return [(start, end - start) for start, end in pairwise(starts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerPlan:
    """A placement of towers on hosts and of tables on ranks.

    Every table lies once, inside the hosts of its tower, and no rank holds more than its
    cluster's `usable_bytes`; a plan that says otherwise is refused.
    """

    cluster: Cluster
    """The machines."""
    tower_hosts: tuple[tuple[NonNegativeInt, ...], ...]
    """Hosts of every tower: one, or k consecutive ones if there are fewer towers than
    hosts (k = H / T, the same for all). Empty for a tower whose tables every rank holds."""
    tables: tuple[TablePlacement, ...]
    """All tables, in the model's order."""
    bytes_per_rank: tuple[NonNegativeInt, ...]
    """Tables and their optimizer's state on each of the W ranks, in bytes."""
    optimizer: TableOptimizer = "rowwise_adagrad"
    """The tables' optimizer that memory is counted for."""
    lookups_per_rank: tuple[Amount, ...]
    """Ids that each rank looks up per sample of the global batch; each rank of a row-wise table
    gets an equal part of them, each rank of a column-wise one gets all."""
    traffic: Traffic
    """What the exchanges carry."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<TowerPlan: {len(self.tower_order)} towers on {self.cluster.hosts} hosts>"

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise PlanError(
                f"an impossible plan: {len(problems)} problem(s)",
                expected="every table once, whole, inside its tower's hosts and their memory",
                hint="make it again with `dmt plan`",
                details=shorten(problems),
            )

    @property
    def tower_order(self) -> tuple[int, ...]:
        """Tower indices in the order in which TorchRec puts their outputs side by side.

        It concatenates by host, then by position in the module, whatever the order of the
        towers: `tower_order[i]` is the tower whose output is the i-th block. If this is not
        (0, 1, ...), give the towers to TorchRec in this order, so that the sharded module and
        the unsharded one agree, and permute the blocks back.
        """
        by_host = sorted((hosts[0], t) for t, hosts in enumerate(self.tower_hosts) if hosts)
        return tuple(t for _, t in by_host)

    @property
    def hosts_per_tower(self) -> int:
        """k; if it is above 1, TORCHREC_RESOLVED_POD_SIZE must be set to it."""
        return max(map(len, self.tower_hosts))

    @property
    def bytes_per_host(self) -> tuple[int, ...]:
        """Tables and optimizer state on each of the H hosts, in bytes."""
        size = self.cluster.ranks_per_host
        ranks = self.bytes_per_rank
        return tuple(sum(ranks[first : first + size]) for first in range(0, len(ranks), size))

    def ranks_of(self, tower: int) -> range:
        """Global ranks of a tower's hosts; all, if its tables are on every rank."""
        hosts, size = self.tower_hosts[tower], self.cluster.ranks_per_host
        if not hosts:
            return range(self.cluster.world_size)
        return range(hosts[0] * size, (hosts[-1] + 1) * size)

    def estimate(self, samples_per_rank: int) -> CommunicationEstimate:
        """Predict the communication time of one step, flat and with towers."""
        return self.traffic.estimate(self.cluster, samples_per_rank)

    def _problems(self) -> list[str]:
        world_size = self.cluster.world_size
        counts = {name: len(getattr(self, name)) for name in ("bytes_per_rank", "lookups_per_rank")}
        problems = [
            f"{name} has {found} entries for {world_size} ranks"
            for name, found in counts.items()
            if found != world_size
        ]
        if problems:  # no work for more hosts than the plan has entries
            return problems
        problems += self._host_problems() or self._table_problems()
        usable = self.cluster.usable_bytes
        problems += [
            f"rank {rank} holds {show_bytes(used)} of {show_bytes(usable)} that tables may use"
            for rank, used in enumerate(self.bytes_per_rank)
            if used > usable
        ]
        return problems

    def _host_problems(self) -> list[str]:
        problems = [] if any(self.tower_hosts) else ["it has no towers on hosts"]
        count = max([1, *map(len, self.tower_hosts)])
        for tower, hosts in enumerate(self.tower_hosts):
            if not hosts:  # on every rank
                continue
            first = hosts[0]
            group = tuple(range(first, first + count))
            if hosts != group or first % count or group[-1] >= self.cluster.hosts:
                problems.append(
                    f"tower {tower} is on hosts {list(hosts)}, not on one group of {count} "
                    f"consecutive hosts of {self.cluster.hosts}"
                )
        idle = sorted(set(range(self.cluster.hosts)) - {h for hs in self.tower_hosts for h in hs})
        if idle:
            problems.append(f"hosts {idle} have no tower")
        return problems

    def _table_problems(self) -> list[str]:
        problems = []
        seen: set[str] = set()
        for placement in self.tables:
            if placement.table in seen:
                problems.append(f"table {placement.table!r} is placed twice")
            seen.add(placement.table)
            if 0 <= placement.tower < len(self.tower_hosts):
                problems += placement.problems(self.ranks_of(placement.tower))
                if placement.is_everywhere == bool(self.tower_hosts[placement.tower]):
                    problems.append(
                        f"table {placement.table!r} is {placement.sharding_type}, its tower on "
                        f"hosts {list(self.tower_hosts[placement.tower])}"
                    )
            else:
                problems.append(
                    f"table {placement.table!r} is in tower {placement.tower} of "
                    f"{len(self.tower_hosts)}"
                )
        bare = sorted(set(range(len(self.tower_hosts))) - {p.tower for p in self.tables})
        return problems + [f"tower {tower} has no table" for tower in bare]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`; `from_json` reads it back.

        It also states what follows from the rest, so that a reader need not compute it:
        `bytes_per_host` and `tower_order`.
        """
        value = to_json(self)
        return {
            "schema_version": SCHEMA_VERSION,
            "cluster": value["cluster"],
            "optimizer": self.optimizer,
            "tower_hosts": value["tower_hosts"],
            "tower_order": list(self.tower_order),
            "tables": value["tables"],
            "bytes_per_rank": value["bytes_per_rank"],
            "bytes_per_host": list(self.bytes_per_host),
            "lookups_per_rank": value["lookups_per_rank"],
            "traffic": value["traffic"],
        }

    @classmethod
    def from_json(cls, value: object) -> TowerPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: It has a newer schema version, lacks something, or contradicts itself; all
                that is wrong is listed.
        """
        return _PLAN.parse(json.dumps(value), "the plan").plan


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanFile(TowerPlan):
    """The content of `plan.json`: a plan, and what follows from it."""

    schema_version: int
    stated_order: Annotated[tuple[int, ...], Field(alias="tower_order")]
    stated_bytes: Annotated[tuple[int, ...], Field(alias="bytes_per_host")]

    def __post_init__(self) -> None:
        TowerPlan.__post_init__(self)
        stated = {"tower_order": self.stated_order, "bytes_per_host": self.stated_bytes}
        problems = [
            f"{name} is {list(found)}, but the rest gives {list(getattr(self, name))}"
            for name, found in stated.items()
            if found != getattr(self, name)
        ]
        if problems:
            raise PlanError(problems[0], details=problems[1:])

    @property
    def plan(self) -> TowerPlan:
        """The plan alone."""
        return TowerPlan(**{part.name: getattr(self, part.name) for part in fields(TowerPlan)})


_PLAN: Final = Layout(
    content=_PlanFile,
    version=SCHEMA_VERSION,
    error=PlanError,
    writer="dmt plan",
    remedy="make the plan again with `dmt plan`",
)


def read_plan(path: Path) -> TowerPlan:
    """Read a plan that `dmt convert` or `dmt plan --out` wrote.

    Raises:
        PlanError: The file is missing, is not a plan, or has a newer schema version.
    """
    return _PLAN.read(path).plan
