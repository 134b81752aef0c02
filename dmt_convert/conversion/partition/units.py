"""Features that cannot be parted, as units; and what must not meet.

A unit is one feature, or several that share a table (a table is placed once) or that the user
wants together. The partitioner moves units, never single features of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.partition.config import PartitionConfig
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LOAD_KINDS: Final[tuple[str, ...]] = ("table bytes", "lookups per sample", "emitted bytes")
EMITTED_BYTES_PER_ELEMENT: Final = 4
"""Pooled embeddings travel as fp32 unless something compresses them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The U units of a model, in the order of their first features."""

    members: tuple[tuple[int, ...], ...]
    """Feature indices of every unit, ascending."""
    weights: IntArray
    """Number of features of every unit, shape (U,)."""
    groups: IntArray
    """Index of every unit's group in the request, -1 for none, shape (U,)."""
    apart: BoolArray | None
    """Whether two units were asked to be apart, shape (U, U); None where nothing was."""
    loads: FloatArray
    """Load of every unit, one column per `LOAD_KINDS`, shape (U, 3)."""

    @property
    def unit_of(self) -> IntArray:
        """Unit index of every feature, shape (F,)."""
        index = np.empty(int(self.weights.sum()), dtype=np.int64)
        for unit, features in enumerate(self.members):
            index[list(features)] = unit
        return index


def build_units(
    spec: ModelSpec, config: PartitionConfig, *, lookups: Mapping[str, float] | None = None
) -> Units:
    """Merge the features that cannot be parted and check that nothing contradicts.

    Args:
        spec: The flat model.
        config: The request; only its constraints are read.
        lookups: Mean ids per sample of every feature; one where not given.

    Raises:
        PartitionError: An unknown feature is named, or together, apart and groups contradict
            each other or the tables that features share. All findings are named at once.
    """
    index = {name: i for i, name in enumerate(spec.feature_names)}
    _check_known(config, index)
    members = _merge_features(spec, config, index)
    names = spec.feature_names
    unit_of = {names[i]: unit for unit, features in enumerate(members) for i in features}
    groups, problems = _find_groups(spec, config, members, unit_of)
    apart, more = _find_apart(spec, config, members, unit_of)
    problems += more
    if problems:
        raise PartitionError(
            f"{len(problems)} contradictions between together, apart, groups and shared tables",
            expected="requests that can all be met; features of one table are always together",
            hint="drop one side of each contradiction",
            details=problems,
        )
    return Units(
        members=members,
        weights=np.array([len(features) for features in members], dtype=np.int64),
        groups=groups,
        apart=apart,
        loads=_measure_loads(spec, members, lookups),
    )


def _find_groups(
    spec: ModelSpec,
    config: PartitionConfig,
    members: tuple[tuple[int, ...], ...],
    unit_of: Mapping[str, int],
) -> tuple[IntArray, list[str]]:
    """Group of every unit, and what contradicts."""
    groups = np.full(len(members), -1, dtype=np.int64)
    problems = []
    for number, (name, features) in enumerate(config.groups):
        for feature in features:
            unit = unit_of[feature]
            if groups[unit] not in (-1, number):
                other = config.groups[groups[unit]][0]
                problems.append(
                    f"{_describe(spec, members[unit])} cannot be parted but belong to groups "
                    f"{other} and {name}"
                )
            groups[unit] = number
    return groups, problems


def _find_apart(
    spec: ModelSpec,
    config: PartitionConfig,
    members: tuple[tuple[int, ...], ...],
    unit_of: Mapping[str, int],
) -> tuple[BoolArray | None, list[str]]:
    """Which units must be apart, and what contradicts."""
    problems = []
    apart = None
    for names in config.apart:
        apart = np.zeros((len(members),) * 2, dtype=bool) if apart is None else apart
        units = [unit_of[name] for name in names]
        for unit in sorted({unit for unit in units if units.count(unit) > 1}):
            problems.append(
                f"{_describe(spec, members[unit])} cannot be parted but "
                f"{','.join(names)} must be apart"
            )
        apart[np.ix_(units, units)] = True
    if apart is not None:
        np.fill_diagonal(apart, False)
    return apart, problems


def _check_known(config: PartitionConfig, index: Mapping[str, int]) -> None:
    named = [name for names in (*config.together, *config.apart) for name in names]
    named += [name for _, names in config.groups for name in names]
    unknown = [name for name in dict.fromkeys(named) if name not in index]
    if unknown:
        raise PartitionError(
            f"{len(unknown)} features of the request are not in the model",
            expected=f"names out of the model's {len(index)} features",
            hint="list the features with `dmt inspect`",
            details=[f"unknown: {name}" for name in unknown],
        )


def _merge_features(
    spec: ModelSpec, config: PartitionConfig, index: Mapping[str, int]
) -> tuple[tuple[int, ...], ...]:
    parent = list(range(len(spec.features)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def merge(features: list[int]) -> None:
        roots = [find(i) for i in features]
        for root in roots:
            parent[root] = min(roots)

    by_table: dict[str, list[int]] = {}
    for i, feature in enumerate(spec.features):
        by_table.setdefault(feature.table, []).append(i)
    for features in by_table.values():
        merge(features)
    for names in config.together:
        merge([index[name] for name in names])
    units: dict[int, list[int]] = {}
    for i in range(len(parent)):
        units.setdefault(find(i), []).append(i)
    return tuple(tuple(features) for _, features in sorted(units.items()))


def _measure_loads(
    spec: ModelSpec, members: tuple[tuple[int, ...], ...], lookups: Mapping[str, float] | None
) -> FloatArray:
    nbytes = {table.name: table.nbytes for table in spec.tables}
    dims = spec.feature_dims
    loads = np.zeros((len(members), len(LOAD_KINDS)))
    for unit, features in enumerate(members):
        names = [spec.features[i].name for i in features]
        loads[unit] = (
            sum(nbytes[table] for table in {spec.features[i].table for i in features}),
            sum(1.0 if lookups is None else lookups.get(name, 1.0) for name in names),
            sum(dims[i] * EMITTED_BYTES_PER_ELEMENT for i in features),
        )
    return loads


def _describe(spec: ModelSpec, features: tuple[int, ...]) -> str:
    names = [spec.features[i].name for i in features]
    return ",".join(names if len(names) <= 8 else [*names[:8], f"... ({len(names)} features)"])
