"""Which host runs which tower, and which rank holds which part of which table.

Letters: T towers, H hosts, R ranks per host, W = H * R world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, cast

from dmt_convert.errors import DmtError, PlanError
from dmt_convert.placement.cluster import Cluster, show_bytes
from dmt_convert.placement.json_reader import JsonReader
from dmt_convert.placement.placement import (
    COMPUTE_KERNEL,
    OPTIMIZER,
    SHARDING_TYPES,
    Shard,
    ShardingType,
    TablePlacement,
)
from dmt_convert.placement.traffic import CommunicationEstimate, Exchange, Traffic

SCHEMA_VERSION: Final = 1

_MAX_DETAILS: Final = 20

_KEYS: Final = (
    "schema_version",
    "cluster",
    "optimizer",
    "tower_hosts",
    "tower_order",
    "tables",
    "bytes_per_rank",
    "bytes_per_host",
    "lookups_per_rank",
    "traffic",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerPlan:
    """A placement of towers on hosts and of tables on ranks.

    Every table lies once, inside the hosts of its tower, and no rank holds more than its
    cluster's `usable_bytes`; a plan that says otherwise cannot be made.
    """

    cluster: Cluster
    """The machines."""
    tower_hosts: tuple[tuple[int, ...], ...]
    """Hosts of every tower: one, or k consecutive ones where there are fewer towers than
    hosts (k = H / T, the same for all)."""
    tables: tuple[TablePlacement, ...]
    """All tables, in the model's order."""
    bytes_per_rank: tuple[int, ...]
    """Tables and row-wise Adagrad state on each of the W ranks, in bytes."""
    lookups_per_rank: tuple[float, ...]
    """Ids that each rank looks up per sample of the global batch; each rank of a row-wise table
    gets an equal part of them, each rank of a column-wise one gets all."""
    traffic: Traffic
    """What the exchanges carry."""

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise PlanError(
                f"this plan cannot be carried out: {len(problems)} problem(s)",
                expected="every table once, whole, inside its tower's hosts and their memory",
                hint="make it anew with `dmt plan`",
                details=shorten(problems),
            )

    @property
    def tower_order(self) -> tuple[int, ...]:
        """Tower indices in the order in which TorchRec puts their outputs side by side.

        It concatenates by host, then by position in the module, whatever the order of the
        towers: `tower_order[i]` is the tower whose output is the i-th block. Where this is not
        (0, 1, ...), give the towers to TorchRec in this order, so that the sharded module and
        the unsharded one agree, and permute the blocks back.
        """
        by_host = sorted((hosts[0], t) for t, hosts in enumerate(self.tower_hosts))
        return tuple(t for _, t in by_host)

    @property
    def hosts_per_tower(self) -> int:
        """k; what TORCHREC_RESOLVED_POD_SIZE must be set to where it is above 1."""
        return len(self.tower_hosts[0])

    @property
    def bytes_per_host(self) -> tuple[int, ...]:
        """Tables and optimizer state on each of the H hosts, in bytes."""
        size = self.cluster.ranks_per_host
        ranks = self.bytes_per_rank
        return tuple(sum(ranks[first : first + size]) for first in range(0, len(ranks), size))

    def ranks_of(self, tower: int) -> range:
        """Global ranks of a tower's hosts."""
        hosts, size = self.tower_hosts[tower], self.cluster.ranks_per_host
        return range(hosts[0] * size, (hosts[-1] + 1) * size)

    def estimate(self, samples_per_rank: int) -> CommunicationEstimate:
        """Predict the communication time of one step, flat and with towers."""
        return self.traffic.estimate(self.cluster, samples_per_rank)

    def _problems(self) -> list[str]:
        problems = self._host_problems() or self._table_problems()
        world_size = self.cluster.world_size
        for name in ("bytes_per_rank", "lookups_per_rank"):
            found = len(getattr(self, name))
            if found != world_size:
                problems.append(f"{name} has {found} entries for {world_size} ranks")
        usable = self.cluster.usable_bytes
        problems += [
            f"rank {rank} holds {show_bytes(used)} of {show_bytes(usable)} that tables may use"
            for rank, used in enumerate(self.bytes_per_rank)
            if used > usable
        ]
        return problems

    def _host_problems(self) -> list[str]:
        problems = [] if self.tower_hosts else ["it has no towers"]
        count = max([1, *map(len, self.tower_hosts)])
        for tower, hosts in enumerate(self.tower_hosts):
            first = hosts[0] if hosts else 0
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
            else:
                problems.append(
                    f"table {placement.table!r} is in tower {placement.tower} of "
                    f"{len(self.tower_hosts)}"
                )
        bare = sorted(set(range(len(self.tower_hosts))) - {p.tower for p in self.tables})
        return problems + [f"tower {tower} has no table" for tower in bare]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back.

        It also holds what follows from the rest and spares a reader the sums: `bytes_per_host`
        and `tower_order`.
        """
        value = asdict(self) | {
            "schema_version": SCHEMA_VERSION,
            "optimizer": OPTIMIZER,
            "tower_order": self.tower_order,
            "bytes_per_host": self.bytes_per_host,
        }
        return {key: value[key] for key in _KEYS}

    @classmethod
    def from_json(cls, value: object) -> TowerPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: It is of another version, lacks something, or contradicts itself; all
                that is wrong is listed.
        """
        version = value.get("schema_version") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and type(version) is int and version != SCHEMA_VERSION:
            raise PlanError(
                f"a plan of schema version {version}",
                expected=f"version {SCHEMA_VERSION}",
                hint="make it anew with `dmt plan`, or use the version that wrote it",
            )
        reader = JsonReader()
        top = reader.fields(value, "the plan", _KEYS)
        reader.integer(top, "schema_version", "")
        reader.text(top, "optimizer", "", (OPTIMIZER,))
        cluster = _read_cluster(reader, top)
        parts: dict[str, Any] = {
            "tower_hosts": reader.items(
                top,
                "tower_hosts",
                "",
                lambda hosts, place: reader.integers({place: hosts}, place, ""),
            ),
            "tables": reader.items(
                top, "tables", "", lambda item, place: _read_placement(reader, item, place)
            ),
            "bytes_per_rank": reader.integers(top, "bytes_per_rank", ""),
            "lookups_per_rank": reader.numbers(top, "lookups_per_rank", ""),
            "traffic": _read_traffic(reader, top.get("traffic", {})),
        }
        derived = {name: reader.integers(top, name, "") for name in _DERIVED}
        _refuse(reader.problems)
        assert cluster is not None
        plan = cls(cluster=cluster, **parts)
        _refuse(
            [
                f"{name} is {list(found)}, but the rest gives {list(getattr(plan, name))}"
                for name, found in derived.items()
                if found != getattr(plan, name)
            ]
        )
        return plan


_DERIVED: Final = ("tower_order", "bytes_per_host")


def shorten(problems: list[str]) -> list[str]:
    """Keep the first problems, and count the rest."""
    rest = len(problems) - _MAX_DETAILS
    return [*problems[:_MAX_DETAILS], f"and {rest} more"] if rest > 0 else problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise PlanError(
            f"this is not a plan: {len(problems)} problem(s)",
            expected="the JSON that `dmt plan` writes",
            hint="make it anew with `dmt plan`",
            details=shorten(problems),
        )


def _read_cluster(reader: JsonReader, top: Mapping[str, object]) -> Cluster | None:
    names = [field.name for field in fields(Cluster)]
    value = reader.fields(top.get("cluster", {}), "cluster", names)
    parts: dict[str, Any] = {
        name: (reader.number if name.endswith("_gbps") else reader.integer)(value, name, "cluster.")
        for name in names
    }
    if reader.problems:
        return None
    try:
        return Cluster(**parts)
    except DmtError as error:
        reader.problems.append(error.found)
        return None


def _read_placement(reader: JsonReader, item: object, place: str) -> TablePlacement:
    value = reader.fields(item, place, [field.name for field in fields(TablePlacement)])
    where = f"{place}."
    return TablePlacement(
        table=reader.text(value, "table", where),
        tower=reader.integer(value, "tower", where),
        sharding_type=cast(
            ShardingType, reader.text(value, "sharding_type", where, SHARDING_TYPES)
        ),
        compute_kernel=reader.text(value, "compute_kernel", where, (COMPUTE_KERNEL,)),
        shards=reader.items(value, "shards", where, lambda s, p: _read_shard(reader, s, p)),
    )


def _read_shard(reader: JsonReader, item: object, place: str) -> Shard:
    names = [field.name for field in fields(Shard)]
    value = reader.fields(item, place, names)
    return Shard(**{name: reader.integer(value, name, f"{place}.") for name in names})


def _read_traffic(reader: JsonReader, item: object) -> Traffic:
    names = [field.name for field in fields(Traffic)]
    value = reader.fields(item, "traffic", names)
    parts: dict[str, Any] = {}
    for name in names:
        if name.endswith("_bytes"):
            parts[name] = reader.number(value, name, "traffic.")
            continue
        place = f"traffic.{name}"
        exchange = reader.fields(value.get(name, {}), place, ("cross_bytes", "intra_bytes"))
        parts[name] = Exchange(
            cross_bytes=reader.number(exchange, "cross_bytes", f"{place}."),
            intra_bytes=reader.number(exchange, "intra_bytes", f"{place}."),
        )
    return Traffic(**parts)
