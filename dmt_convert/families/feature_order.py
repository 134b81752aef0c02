"""Which feature is looked up in which table, and in which order they enter the interaction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from dmt_convert.checkpoint import FlatCheckpoint
from dmt_convert.errors import ArchitectureError, ConfigError
from dmt_convert.families.architecture import Architecture
from dmt_convert.families.facts import Fact
from dmt_convert.families.model_config import FeatureConfig, ModelConfig
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_MODULE = "the configs of the tables in the pickled module"


def features_of_module(
    checkpoint: FlatCheckpoint, tables: list[TableSpec]
) -> tuple[FeatureConfig, ...] | None:
    """Return what a pickled module says of its features; None where it is not of these tables."""
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


def infer_features(
    tables: list[str],
    *,
    ordered: bool,
    family: Architecture,
    config: ModelConfig,
    known_order: Fact | None = None,
    told: tuple[FeatureConfig, ...] | None = None,
) -> tuple[tuple[FeatureSpec, ...], list[Fact]]:
    """Name the features and put them in order.

    Args:
        tables: Table names in the order of the checkpoint.
        ordered: Whether that order is the order in which the model was built.
        family: The family.
        config: What the user says.
        known_order: Why that order is the interaction's, where the checkpoint says so.
        told: What a pickled module says, which counts where the user says nothing.

    Raises:
        ArchitectureError: The order was lost and cannot be restored.
        ConfigError: The user's features do not fit the tables.
    """
    derived = {_feature_name(table, family): table for table in tables}
    if len(derived) < len(tables):
        derived = {table: table for table in tables}
    pooling, facts = _pooling(config)
    if config.features is not None:
        order = tables
        if known_order is None and not _names_tables(config.features, derived, tables):
            order, _ = _order(tables, ordered=ordered, family=family)
        pairs = _given_features(config.features, derived, order)
        facts.append(_fact("features", f"{len(pairs)} features", "given", "--model-config"))
        own = {f.name: f.pooling for f in config.features if f.pooling is not None}
    elif told is not None:
        pairs = [(f.name, f.table or f.name) for f in told]
        facts.append(_fact("features", f"{len(pairs)} features", "read", _MODULE))
        own = {}
        if config.pooling is None:
            own = {f.name: f.pooling for f in told if f.pooling is not None}
            kinds = " and ".join(sorted(set(own.values())))
            facts[0] = _fact("pooling", kinds, "read", _MODULE)
        elif isinstance(pooling, Mapping):
            own = {f.name: f.pooling for f in told if f.pooling and f.name not in pooling}
    else:
        order, fact = tables, known_order
        if fact is None:
            order, fact = _order(tables, ordered=ordered, family=family)
        names = {table: name for name, table in derived.items()}
        pairs = [(names[table], table) for table in order]
        facts += [fact, _naming_fact(pairs, family)]
        own = {}
    unknown = set(pooling if isinstance(pooling, Mapping) else ()) - {name for name, _ in pairs}
    if unknown:
        raise ConfigError(
            f"the model config gives the pooling of unknown features {sorted(unknown)}",
            expected="names among " + ", ".join(name for name, _ in pairs[:8]) + ", ...",
            hint="list the features with `dmt inspect`",
        )
    features = tuple(
        FeatureSpec(name=name, table=table, pooling=own.get(name) or _pooling_of(pooling, name))
        for name, table in pairs
    )
    return features, facts


def _fact(subject: str, value: str, source: str, reason: str) -> Fact:
    return Fact(subject=subject, value=value, source=source, reason=reason)  # type: ignore[arg-type]


def _feature_name(table: str, family: Architecture) -> str:
    if family.positional:
        return f"f{table}"
    return table.removeprefix(family.feature_prefix) or table


def _naming_fact(pairs: list[tuple[str, str]], family: Architecture) -> Fact:
    first, last = pairs[0][0], pairs[-1][0]
    value = first if len(pairs) == 1 else f"{first} ... {last}"
    if family.positional:
        return _fact("feature names", value, "assumed", "the trainer numbers its features")
    return _fact(
        "feature names", value, "assumed", "one feature per table, named after it; not stored"
    )


def _pooling(config: ModelConfig) -> tuple[Pooling | Mapping[str, Pooling], list[Fact]]:
    if config.pooling is not None:
        return config.pooling, [_fact("pooling", str(config.pooling), "given", "--model-config")]
    return "sum", [_fact("pooling", "sum", "assumed", "the trainer's default; not stored")]


def _pooling_of(pooling: Pooling | Mapping[str, Pooling], name: str) -> Pooling:
    return pooling.get(name, "sum") if isinstance(pooling, Mapping) else pooling


def _names_tables(
    features: tuple[FeatureConfig, ...], derived: Mapping[str, str], tables: list[str]
) -> bool:
    """Tell whether the user's list says which tables are meant; else it is new names in order."""
    known = [f.table is not None or f.name in derived or f.name in tables for f in features]
    return any(known) or len(features) != len(tables)


def _given_features(
    features: tuple[FeatureConfig, ...],
    derived: Mapping[str, str],
    tables: list[str],
) -> list[tuple[str, str]]:
    """Resolve the user's list: explicit tables, known names, or new names by position."""
    if not _names_tables(features, derived, tables):
        return [(f.name, table) for f, table in zip(features, tables, strict=True)]
    names = {table: name for name, table in derived.items()}
    pairs = []
    for feature in features:
        if feature.table is not None:
            pairs.append((feature.name, feature.table))
        elif feature.name in derived:
            pairs.append((feature.name, derived[feature.name]))
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


def _order(tables: list[str], *, ordered: bool, family: Architecture) -> tuple[list[str], Fact]:
    natural, gapless = _natural_order(tables)
    shown = f"{tables[0]} ... " if len(tables) > 1 else tables[0]
    sorted_as_strings = ordered and tables == sorted(tables) and not family.positional
    if natural is not None and natural != tables and sorted_as_strings and not gapless:
        # either the model was built so, or DMP sorted it: nothing tells
        raise _order_lost(tables)
    if natural is not None and (not ordered or tables == sorted(tables) or family.positional):
        reason = "table names are numbered"
        if ordered and tables != natural:
            reason = "table names are numbered, and stand sorted as strings, as DMP leaves them"
        elif not ordered:
            reason = "table names are numbered; the file does not keep the order"
        source = "read" if ordered and tables == natural else "inferred"
        value = f"{natural[0]} ... {natural[-1]}" if len(natural) > 1 else natural[0]
        return natural, _fact("feature order", value, source, reason)
    if ordered:
        source = "assumed" if len(tables) > 2 and tables == sorted(tables) else "read"
        reason = "order of the file"
        if source == "assumed":
            reason += "; it is alphabetical, as DMP would leave it: check it"
        return tables, _fact(
            "feature order", shown + tables[-1] * (len(tables) > 1), source, reason
        )
    if len(tables) == 1:
        return tables, _fact("feature order", tables[0], "inferred", "there is one table")
    raise _order_lost(tables)


def _order_lost(tables: list[str]) -> ArchitectureError:
    return ArchitectureError(
        "the order in which the features enter the interaction is not in the checkpoint",
        expected="tables whose names are numbered, or a file that keeps the order",
        hint="list the features in the model's order with --model-config: "
        "`features: [" + ", ".join(sorted(tables)[:3]) + ", ...]`",
        details=[f"{len(tables)} tables: " + ", ".join(sorted(tables)[:12])],
    )


def _natural_order(tables: list[str]) -> tuple[list[str] | None, bool]:
    """Sort by the one number in every name.

    Returns:
        The tables in order, None where their names are no sequence (`clicks_7d`, `clicks_30d`
        are none); and whether the numbers run from 0 or 1 without gaps.
    """
    keyed = []
    for table in tables:
        parts = re.split(r"(\d+)", table)
        keyed.append((tuple(parts[0::2]), tuple(int(part[:18]) for part in parts[1::2])))
    skeletons = {skeleton for skeleton, _ in keyed}
    numbers = [number for _, number in keyed]
    if len(skeletons) != 1 or len(set(numbers)) != len(numbers) or not numbers[0]:
        return None, False
    varying = [i for i in range(len(numbers[0])) if len({number[i] for number in numbers}) > 1]
    if len(varying) > 1:
        return None, False
    gapless, last = True, True
    if varying:
        own = sorted(number[varying[0]] for number in numbers)
        gapless = own[0] in (0, 1) and own == list(range(own[0], own[0] + len(own)))
        last = keyed[0][0][-1] == "" and varying[0] == len(numbers[0]) - 1
    if not gapless and not last:
        return None, False
    return [table for _, table in sorted(zip(numbers, tables, strict=True))], gapless
