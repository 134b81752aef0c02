"""What leaves the towers for every rank, as `--replicate` asks, and how the rest is partitioned.

Features leave in units, as the partitioner moves them: those of one table, or that the user wants
together. A unit leaves only if all its tables may.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.arrays import FloatArray
from dmt_convert.config import ConvertConfig, PartitionOptions
from dmt_convert.conversion.partition import (
    JointCodes,
    Partition,
    build_units,
    measure_loads,
    partition_features,
)
from dmt_convert.errors import ConfigError, PartitionError
from dmt_convert.model import DmtSpec, TowerModuleSpec, converted_spec
from dmt_convert.placement import BATCH, StepCost, cheaper_everywhere, make_cluster
from dmt_convert.spec import InteractionSpec, MlpSpec, ModelSpec, TowerAssignment

NOTHING: Final = "none"
"""Of `--replicate`."""
AUTO: Final = "auto"
"""Of `--replicate`: what is cheaper."""


def fit_for_replication(
    modules: Sequence[TowerModuleSpec], config: ConvertConfig
) -> tuple[TowerModuleSpec, ...]:
    """Return the candidates beside which features may be on every rank.

    Raises:
        ConfigError: There are none.
    """
    if config.replicate == NOTHING:
        return tuple(modules)
    fitting = tuple(module for module in modules if module.rules.keeps_network)
    if not fitting:
        kinds = ", ".join(dict.fromkeys(module.kind for module in modules))
        raise ConfigError(
            f"--replicate {config.replicate} beside {kinds} tower modules: these change what the "
            "interaction takes, but embeddings of a rank's own tables arrive as they are",
            expected="--tower-module linear or passthrough, which keep the flat model's network",
            hint="choose --tower-module linear, or --replicate none",
        )
    return fitting


def choose_replicated(
    spec: ModelSpec,
    config: ConvertConfig,
    module: TowerModuleSpec,
    ids_per_bag: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Return the features whose tables every rank shall hold, in the model's order.

    Every tower that sends keeps a unit of features at least; those with the fewest rows leave.

    Args:
        spec: The flat model.
        config: What is asked for.
        module: The tower module of the others; its compression decides what they cost.
        ids_per_bag: Mean ids per bag of every feature; 1 if it is not named.

    Raises:
        PartitionError: Constraints contradict each other, or what leaves.
    """
    if config.replicate == NOTHING:
        return ()
    units = [
        tuple(spec.features[i].name for i in members)
        for members in build_units(spec, config).members
    ]
    tables = spec.tables_by_feature
    rows = {names: max(tables[name].rows for name in names) for names in units}
    whole = _partition_whole(spec, config)
    if config.replicate != AUTO:
        may = {table.name for table in spec.tables if table.rows <= int(config.replicate)}
    else:
        cost = _step_cost(spec, config, whole, module)
        may = set(cheaper_everywhere(spec, cost, ids_per_bag))
    leaving = [names for names in units if all(tables[name].name in may for name in names)]
    leaving.sort(key=lambda names: rows[names])
    if isinstance(config.partition, Path):
        leaving = _leave_towers_their_last(leaving, units, whole)
    else:
        leaving = leaving[: max(0, len(units) - len(whole.towers))]
    chosen = {name for names in leaving for name in names}
    replicated = tuple(name for name in spec.feature_names if name in chosen)
    _check_apart(config, replicated)
    return replicated


def _partition_whole(spec: ModelSpec, config: ConvertConfig) -> Partition:
    """Return the towers of a file, or as many of the same size."""
    known = isinstance(config.partition, Path)
    return partition_features(spec, config if known else config.replace(partition="round-robin"))


def _step_cost(
    spec: ModelSpec, config: ConvertConfig, whole: Partition, module: TowerModuleSpec
) -> StepCost:
    return StepCost(
        cluster=make_cluster(config, hosts=len(whole.towers)),
        batch=config.batch or BATCH,
        compression=max(1.0, converted_spec(spec, whole.towers, module).compression),
    )


def _leave_towers_their_last(
    leaving: Sequence[tuple[str, ...]], units: Sequence[tuple[str, ...]], whole: Partition
) -> list[tuple[str, ...]]:
    """Of units that leave, the fewest rows first, keep back the last of a tower."""
    tower_of = whole.assignment.tower_of
    left = [0] * len(whole.towers)
    for names in units:
        left[tower_of[names[0]]] += 1
    gone = []
    for names in leaving:
        tower = tower_of[names[0]]
        if left[tower] > 1:
            left[tower] -= 1
            gone.append(names)
    return gone


def _check_apart(config: ConvertConfig, replicated: Sequence[str]) -> None:
    met = [
        sorted(set(rivals) & set(tower))
        for tower in group_features(config, replicated)
        for rivals in config.apart
    ]
    if any(len(names) > 1 for names in met):
        raise PartitionError(
            f"--replicate {config.replicate} puts features on every rank that must be apart",
            expected="constraints that can all be met",
            hint="drop --apart for them, or give --replicate fewer rows",
            details=[f"both on every rank: {','.join(n)}" for n in met if len(n) > 1],
        )


def group_features(
    options: PartitionOptions, features: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Make towers of features that every rank holds: one, or one per group and one of the rest."""
    group_of = {name: group for group, names in options.group for name in names}
    towers: dict[str | None, list[str]] = {}
    for name in features:
        towers.setdefault(group_of.get(name), []).append(name)
    return tuple(map(tuple, towers.values()))


def partition_beside(
    spec: ModelSpec,
    options: PartitionOptions,
    affinity: FloatArray | None,
    replicated: Sequence[str],
    *,
    measure_codes: Callable[[Sequence[int]], JointCodes] | None = None,
) -> Partition:
    """Partition the features that are not on every rank; these are the last towers.

    Args:
        spec: The flat model.
        options: The request; a file names all features.
        affinity: As for `partition_features`, over all features.
        replicated: What `choose_replicated` chose.
        measure_codes: Gives what codes of some features lose, by their indices; for the strategy
            `loss`.

    Raises:
        PartitionError: The request cannot be met.
    """
    if not replicated:
        codes = None if measure_codes is None else measure_codes(range(len(spec.features)))
        return partition_features(spec, options, affinity, codes=codes)
    gone = set(replicated)
    if isinstance(options.partition, Path):
        found = partition_features(spec, options, affinity)
        sending = tuple(tuple(name for name in tower if name not in gone) for tower in found.towers)
    else:
        kept = [i for i, name in enumerate(spec.feature_names) if name not in gone]
        found = partition_features(
            _only(spec, [spec.feature_names[i] for i in kept]),
            _without(options, gone),
            None if affinity is None else affinity[np.ix_(kept, kept)],
            codes=None if measure_codes is None else measure_codes(kept),
        )
        sending = found.towers
        if affinity is None and found.affinity is not None:  # by loss: of the others alone
            affinity = np.eye(len(spec.features), dtype=np.float32)
            affinity[np.ix_(kept, kept)] = found.affinity
    everywhere = group_features(options, replicated)
    assignment = TowerAssignment(towers=(*sending, *everywhere))
    return replace(
        found,
        assignment=assignment,
        everywhere=everywhere,
        affinity=affinity,
        loads=measure_loads(spec, assignment),
    )


def _only(spec: ModelSpec, names: Sequence[str]) -> ModelSpec:
    """Return a model with some of the features alone, as the partitioner looks at it."""
    features = tuple(feature for feature in spec.features if feature.name in set(names))
    used = {feature.table for feature in features}
    tables = tuple(table for table in spec.tables if table.name in used)
    dims = {table.name: table.dim for table in tables}
    width = spec.num_dense + sum(dims[feature.table] for feature in features)
    return ModelSpec(
        family=spec.family,
        tables=tables,
        features=features,
        dense_arch=MlpSpec(widths=(spec.num_dense,), final_relu=False),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(width, 1), final_relu=False),
    )


def _without(options: PartitionOptions, gone: Collection[str]) -> PartitionOptions:
    """Return a request of which only what concerns the others is left."""

    def rest(lists: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        left = [tuple(name for name in names if name not in gone) for names in lists]
        return tuple(names for names in left if len(names) > 1)

    groups = [
        (group, tuple(name for name in names if name not in gone)) for group, names in options.group
    ]
    return options.replace(
        together=rest(options.together),
        apart=rest(options.apart),
        group=tuple((group, names) for group, names in groups if names),
    )


def spec_of(spec: ModelSpec, partition: Partition, module: TowerModuleSpec) -> DmtSpec:
    """Put a module over every tower that sends."""
    return converted_spec(spec, partition.sending, module, everywhere=partition.everywhere)
