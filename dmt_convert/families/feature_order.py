"""Which feature is looked up in which table, and in which order features enter the interaction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dmt_convert.checkpoint import FlatCheckpoint
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.model_config import FeatureConfig, ModelConfig
from dmt_convert.families.model_info import Fact, Source
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_MODULE = "the configs of the tables in the pickled module"


def features_of_module(
    checkpoint: FlatCheckpoint, tables: Sequence[TableSpec]
) -> tuple[FeatureConfig, ...] | None:
    """Return what a pickled module says about its features; None if it has other tables."""
    configs = checkpoint.table_configs
    features = tuple(
        FeatureConfig(name=name, table=config.name, pooling=config.pooling)
        for config in configs
        for name in config.features
    )
    names = [config.name for config in configs]
    known = sorted(names) == sorted(table.name for table in tables)
    distinct = len({feature.name for feature in features}) == len(features)
    return features if known and distinct and all(c.features for c in configs) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureNaming:
    """How a trainer relates the names of tables to those of features."""

    numbered: bool = False
    """Whether features have numbers instead of names."""
    prefix: str = ""
    """Prefix that makes a table's name of a feature's name."""

    def feature_of(self, table: str) -> str:
        """Return the name of the feature that a table is named after."""
        return f"f{table}" if self.numbered else table.removeprefix(self.prefix) or table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """Features with their tables, and how they were determined."""

    pairs: list[tuple[str, str]]
    """Feature and table, in interaction order."""
    facts: list[Fact]
    poolings: Mapping[str, Pooling] = field(default_factory=dict)
    """Poolings that are listed with the features, by feature."""
    pooling_fact: Fact | None = None
    """What to say about pooling, if the list decides it."""


def infer_features(
    source: TrainerTensors,
    tables: list[str],
    naming: FeatureNaming | None = None,
    *,
    stored: tuple[FeatureConfig, ...] | None = None,
) -> tuple[tuple[FeatureSpec, ...], list[Fact]]:
    """Name the features and put them in order.

    Args:
        source: The model; `ordered` and `order` say how far to trust the order of the tables.
        tables: Table names in the order of the checkpoint.
        naming: How the trainer names tables. Default: after their features.
        stored: What a pickled module says; counts if the user says nothing.

    Returns:
        The features, and how they were determined.

    Raises:
        ArchitectureError: The order was lost and cannot be restored.
        ConfigError: The user's features do not fit the tables.
    """
    naming, config = naming or FeatureNaming(), source.config
    table_of = {naming.feature_of(table): table for table in tables}
    if len(table_of) < len(tables):
        table_of = {table: table for table in tables}
    if config.features is not None:
        listing = _listed_by_user(source, config.features, table_of, tables, naming)
    elif stored is not None:
        listing = _listed_by_module(stored, config)
    else:
        listing = _one_per_table(source, table_of, tables, naming)
    names = [name for name, _ in listing.pairs]
    general, fact = _pooling(config)
    unknown = sorted(set(general if isinstance(general, Mapping) else ()) - set(names))
    if unknown:
        raise ConfigError(
            f"the model config gives the pooling of unknown features {unknown}",
            expected="names among " + ", ".join(names[:8]) + ", ...",
            hint="`dmt inspect` lists the features",
        )
    features = tuple(
        FeatureSpec(
            name=name, table=table, pooling=listing.poolings.get(name) or _pooling_of(general, name)
        )
        for name, table in listing.pairs
    )
    return features, [listing.pooling_fact or fact, *listing.facts]


def _listed_by_user(
    source: TrainerTensors,
    features: tuple[FeatureConfig, ...],
    table_of: Mapping[str, str],
    tables: list[str],
    naming: FeatureNaming,
) -> _Listing:
    order = tables
    if source.order is None and not _names_tables(features, table_of, tables):
        order, _ = order_tables(source, tables, naming)
    pairs = _given_features(features, table_of, order)
    return _Listing(
        pairs=pairs,
        facts=[_fact("features", f"{len(pairs)} features", "given", "--model-config")],
        poolings={f.name: f.pooling for f in features if f.pooling is not None},
    )


def _listed_by_module(features: tuple[FeatureConfig, ...], config: ModelConfig) -> _Listing:
    poolings = {f.name: f.pooling for f in features if f.pooling is not None}
    fact = None
    if config.pooling is None:
        fact = _fact("pooling", " and ".join(sorted(set(poolings.values()))), "read", _MODULE)
    elif isinstance(config.pooling, Mapping):
        poolings = {name: kind for name, kind in poolings.items() if name not in config.pooling}
    else:
        poolings = {}
    return _Listing(
        pairs=[(f.name, f.table or f.name) for f in features],
        facts=[_fact("features", f"{len(features)} features", "read", _MODULE)],
        poolings=poolings,
        pooling_fact=fact,
    )


def _one_per_table(
    source: TrainerTensors, table_of: Mapping[str, str], tables: list[str], naming: FeatureNaming
) -> _Listing:
    order, fact = tables, source.order
    if fact is None:
        order, fact = order_tables(source, tables, naming)
    names = {table: name for name, table in table_of.items()}
    pairs = [(names[table], table) for table in order]
    first, last = pairs[0][0], pairs[-1][0]
    value = first if len(pairs) == 1 else f"{first} ... {last}"
    reason = "one feature per table, named after it; not stored"
    if naming.numbered:
        reason = "the trainer numbers its features"
    return _Listing(pairs=pairs, facts=[fact, _fact("feature names", value, "assumed", reason)])


def _fact(subject: str, value: str, source: Source, reason: str) -> Fact:
    return Fact(subject=subject, value=value, source=source, reason=reason)


def _pooling(config: ModelConfig) -> tuple[Pooling | Mapping[str, Pooling], Fact]:
    if config.pooling is not None:
        return config.pooling, _fact("pooling", str(config.pooling), "given", "--model-config")
    return "sum", _fact("pooling", "sum", "assumed", "the trainer's default; not stored")


def _pooling_of(pooling: Pooling | Mapping[str, Pooling], name: str) -> Pooling:
    return pooling.get(name, "sum") if isinstance(pooling, Mapping) else pooling


def _names_tables(
    features: tuple[FeatureConfig, ...], table_of: Mapping[str, str], tables: list[str]
) -> bool:
    """Tell whether the user's list names tables; otherwise it gives new names in order."""
    known = [f.table is not None or f.name in table_of or f.name in tables for f in features]
    return any(known) or len(features) != len(tables)


def _given_features(
    features: tuple[FeatureConfig, ...],
    table_of: Mapping[str, str],
    tables: list[str],
) -> list[tuple[str, str]]:
    """Resolve the user's list: explicit tables, known names, or new names by position."""
    if not _names_tables(features, table_of, tables):
        return [(f.name, table) for f, table in zip(features, tables, strict=True)]
    names = {table: name for name, table in table_of.items()}
    pairs = []
    for feature in features:
        if feature.table is not None:
            pairs.append((feature.name, feature.table))
        elif feature.name in table_of:
            pairs.append((feature.name, table_of[feature.name]))
        else:
            pairs.append((names.get(feature.name, feature.name), feature.name))
    used = {table for _, table in pairs}
    missing = [table for table in tables if table not in used]
    unknown = sorted(used - set(tables))
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if missing or unknown or twice:
        raise ConfigError(
            f"the model config lists {len(features)} features that do not fit the "
            f"{len(tables)} tables",
            expected="every table used by at least one feature, every feature named once",
            hint="give `{name: ..., table: ...}` for every feature",
            details=[f"table without a feature: {table}" for table in missing]
            + [f"unknown table: {table}" for table in unknown]
            + [f"feature named twice: {name}" for name in sorted(twice)],
        )
    return pairs


def order_tables(
    source: TrainerTensors, tables: list[str], naming: FeatureNaming | None = None
) -> tuple[list[str], Fact]:
    """Put tables in the order of their features.

    What counts, in this order: the modules, whose names a state dict keeps; numbers from 0 or 1
    without gaps; the file, if nothing suggests that it was sorted or put together anew.
    DistributedModelParallel (DMP) sorts tables by name as strings, so that t_10 precedes t_2.

    Raises:
        ArchitectureError: The order was lost, or names and file contradict each other.
    """
    known = set(tables)
    built = [table for table in source.tables_by_module() if table in known]
    grouped = not source.ordered and source.checkpoint.ordered
    if sorted(built) == sorted(tables) and not grouped:
        return built, _order_fact(built, "read", "the order of the modules in the state dict")
    if naming is not None and naming.numbered:
        ordered = sorted(tables, key=int)
        return ordered, _order_fact(ordered, "read", "the trainer numbers its tables")
    natural = _natural_order(tables)
    if len(tables) == 1:
        return tables, _order_fact(tables, "inferred", "there is one table")
    alphabetical = tables == sorted(tables)
    if natural is not None and not source.ordered:
        reason = "table names are numbered without gaps; the file does not keep the order"
        return natural, _order_fact(natural, "assumed", reason)
    if natural is not None and natural == tables:
        return natural, _order_fact(natural, "read", "table names are numbered, as they stand")
    if natural is not None and alphabetical:
        reason = "table names are numbered, and stand sorted as strings, as DMP leaves them"
        return natural, _order_fact(natural, "assumed", reason)
    if natural is not None or alphabetical or not source.ordered:
        raise _order_lost(source, tables)
    return tables, _order_fact(
        tables, "assumed", "order of the file, which tells neither its modules nor numbers"
    )


def _order_fact(tables: list[str], source: Source, reason: str) -> Fact:
    value = f"{tables[0]} ... {tables[-1]}" if len(tables) > 1 else tables[0]
    return _fact("feature order", value, source, reason)


def _order_lost(source: TrainerTensors, tables: list[str]) -> ArchitectureError:
    shown = ", ".join(tables[:3]) + (", ..." if len(tables) > 3 else "")
    return ArchitectureError(
        f"{source.checkpoint.source}: the order in which the features enter the interaction is "
        "not in the checkpoint",
        expected="a state dict as `state_dict()` returns it, or tables numbered from 0 or 1 "
        "without gaps that stand in this order or sorted",
        hint="list the features in the model's order with --model-config: "
        f"`features: [{shown}]` (here as they stand in the file)",
        details=[f"{len(tables)} tables: " + ", ".join(tables[:12])],
    )


def _natural_order(tables: list[str]) -> list[str] | None:
    """Sort by the one number in every name that runs from 0 or 1 without gaps.

    Numbers with gaps are names (fields, widths, days) and say nothing about the order. None if the
    names are no such sequence.
    """
    keyed = []
    for table in tables:
        parts = re.split(r"(\d+)", table)
        keyed.append((tuple(parts[0::2]), tuple(int(part[:18]) for part in parts[1::2])))
    numbers = [number for _, number in keyed]
    if len({skeleton for skeleton, _ in keyed}) != 1 or not numbers[0]:
        return None
    varying = [i for i in range(len(numbers[0])) if len({number[i] for number in numbers}) > 1]
    if len(varying) != 1:
        return None
    own = sorted(number[varying[0]] for number in numbers)
    if own[0] not in (0, 1) or own != list(range(own[0], own[0] + len(own))):
        return None
    return [table for _, table in sorted(zip(numbers, tables, strict=True))]
