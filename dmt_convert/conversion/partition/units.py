"""Features that must share a tower, as units, and which units must not meet.

A unit is one feature, or several that share a table (a table is placed once) or that the user
wants together. The partitioner moves whole units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.arrays import BoolArray, Float64Array, IntArray
from dmt_convert.config import PartitionOptions
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec

NO_GROUP: Final = -1
LOAD_KINDS: Final[tuple[str, ...]] = ("table bytes", "lookups per sample", "emitted bytes")
EMITTED_BYTES_PER_ELEMENT: Final = 4
"""Pooled embeddings travel as fp32 unless something compresses them."""

Members = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The U units of a model, in the order of their first features."""

    members: Members
    """Feature indices of every unit, ascending."""
    weights: IntArray
    """Number of features of every unit, shape (U,)."""
    groups: IntArray
    """Index of every unit's group in the request, or `NO_GROUP`, shape (U,)."""
    apart: BoolArray | None
    """Pairs of units that the request keeps apart, shape (U, U); None without such pairs."""
    loads: Float64Array
    """Load of every unit, one column per `LOAD_KINDS`, shape (U, 3)."""

    @property
    def unit_of(self) -> IntArray:
        """Unit index of every feature, shape (F,)."""
        index = np.empty(int(self.weights.sum()), dtype=np.int64)
        for unit, features in enumerate(self.members):
            index[list(features)] = unit
        return index

    def find_conflicts(self) -> BoolArray | None:
        """Pairs of units that must not meet, groups included, shape (U, U); None without any."""
        grouped = self.groups != NO_GROUP
        if len(np.unique(self.groups[grouped])) < 2:
            return self.apart
        strangers: BoolArray = grouped[:, None] & grouped & (self.groups[:, None] != self.groups)
        return strangers if self.apart is None else strangers | self.apart


def build_units(
    spec: ModelSpec, config: PartitionOptions, *, lookups: Mapping[str, float] | None = None
) -> Units:
    """Merge the features that must share a tower, and check that no constraints contradict.

    Args:
        spec: The flat model.
        config: The request; only its constraints are read.
        lookups: Mean ids per sample of every feature; 1 for features that are not given.

    Raises:
        PartitionError: A feature is unknown, or together, apart and groups contradict each other
            or the tables that features share. All problems are named at once.
    """
    names = spec.feature_names
    index = {name: i for i, name in enumerate(names)}
    _check_known(config, index)
    members = _merge_features(spec, config, index)
    unit_of = {names[i]: unit for unit, features in enumerate(members) for i in features}
    labels = [_shorten([names[i] for i in features]) for features in members]
    problems = [
        *_mixed_groups(config, unit_of, labels),
        *_inseparable_rivals(config, unit_of, labels),
    ]
    if problems:
        raise PartitionError(
            f"{len(problems)} contradictions between together, apart, groups and shared tables",
            expected="constraints that can all be met; features of one table always share a tower",
            hint="drop one side of each contradiction",
            details=problems,
        )
    groups = np.full(len(members), NO_GROUP, dtype=np.int64)
    for number, (_, features) in enumerate(config.group):
        groups[[unit_of[name] for name in features]] = number
    apart = np.zeros((len(members),) * 2, dtype=bool) if config.apart else None
    for rivals in config.apart:
        assert apart is not None
        units = [unit_of[name] for name in rivals]
        apart[np.ix_(units, units)] = ~np.eye(len(units), dtype=bool)
    return Units(
        members=members,
        weights=np.array([len(features) for features in members], dtype=np.int64),
        groups=groups,
        apart=apart,
        loads=_measure_loads(spec, members, lookups),
    )


def _mixed_groups(
    config: PartitionOptions, unit_of: Mapping[str, int], labels: list[str]
) -> Iterator[str]:
    """Name the units whose features belong to several groups."""
    group_of: dict[int, str] = {}
    for group, features in config.group:
        for unit in dict.fromkeys(unit_of[name] for name in features):
            if unit in group_of:
                yield (
                    f"{labels[unit]} are inseparable but belong to groups {group_of[unit]} and "
                    f"{group}"
                )
            group_of[unit] = group


def _inseparable_rivals(
    config: PartitionOptions, unit_of: Mapping[str, int], labels: list[str]
) -> Iterator[str]:
    """Name the units of which several features must be apart."""
    for rivals in config.apart:
        units = [unit_of[name] for name in rivals]
        for unit in sorted({unit for unit in units if units.count(unit) > 1}):
            yield f"{labels[unit]} are inseparable but {','.join(rivals)} must be apart"


def _check_known(config: PartitionOptions, index: Mapping[str, int]) -> None:
    named = [name for names in (*config.together, *config.apart) for name in names]
    named += [name for _, names in config.group for name in names]
    unknown = [name for name in dict.fromkeys(named) if name not in index]
    if unknown:
        raise PartitionError(
            f"{len(unknown)} features of the request are not in the model",
            expected=f"names of the model's {len(index)} features",
            hint="list the features with `dmt inspect`",
            details=[f"unknown: {name}" for name in unknown],
        )


def _merge_features(spec: ModelSpec, config: PartitionOptions, index: Mapping[str, int]) -> Members:
    """Union-find over the features of one table and the features of every `together`."""
    parent = list(range(len(index)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    tables: dict[str, list[int]] = {}
    for i, feature in enumerate(spec.features):
        tables.setdefault(feature.table, []).append(i)
    together = ([index[name] for name in names] for names in config.together)
    for features in (*tables.values(), *together):
        roots = [find(i) for i in features]
        for root in roots:
            parent[root] = min(roots)
    units: dict[int, list[int]] = {}
    for i in range(len(parent)):
        units.setdefault(find(i), []).append(i)
    return tuple(tuple(features) for features in units.values())


def _measure_loads(
    spec: ModelSpec, members: Members, lookups: Mapping[str, float] | None
) -> Float64Array:
    nbytes = {table.name: table.nbytes for table in spec.tables}
    dims = spec.feature_dims
    loads = np.zeros((len(members), len(LOAD_KINDS)))
    for unit, features in enumerate(members):
        mine = [spec.features[i] for i in features]
        loads[unit] = (
            sum(nbytes[table] for table in {feature.table for feature in mine}),
            sum((lookups or {}).get(feature.name, 1.0) for feature in mine),
            sum(dims[i] * EMITTED_BYTES_PER_ELEMENT for i in features),
        )
    return loads


def _shorten(names: list[str]) -> str:
    return ",".join(names if len(names) <= 8 else [*names[:8], f"... ({len(names)} features)"])
