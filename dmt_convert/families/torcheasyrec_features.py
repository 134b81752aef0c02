"""The features of a TorchEasyRec model, from `pipeline.config` and from its tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.feature_order import infer_features
from dmt_convert.families.trainer_tensors import TrainerTensors
from dmt_convert.spec import FeatureSpec, Pooling, TableSpec

_TABLE: Final = re.compile(
    r"embedding_group\.emb_impls\.[^.]+\.ebc\.embedding_bags\.([^.]+)\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One entry of a feature group."""

    name: str
    """Feature name."""
    table: str | None
    """Its table, None for a dense feature."""
    dim: int
    """Embedding dim, or number of dense inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """What the model takes."""

    tables: tuple[TableSpec, ...]
    """All tables."""
    features: tuple[FeatureSpec, ...]
    """All categorical features, in the order of their group."""
    sparse: tuple[Field, ...]
    """The group that the model takes (DLRM: `sparse`), in its order."""
    num_dense: int | None
    """DLRM only: width of the group `dense`; None where nothing says."""
    model: Mapping[str, Any]
    """What pipeline.config says of the model; empty where there is none."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Embedding dim of every feature."""
        return tuple(field.dim for field in self.sparse if field.table is not None)

    @property
    def inputs(self) -> list[list[Any]]:
        """What the group holds, as the network `deep-cross` wants it."""
        found: list[list[Any]] = []
        feature = dense = 0
        for field in self.sparse:
            if field.table is not None:
                found.append(["feature", feature])
                feature += 1
            else:
                found += [["dense", dense + i] for i in range(field.dim)]
                dense += field.dim
        return found

    def activation(self, model: str, stack: str) -> str | None:
        """Return the activation of a stack, None where nothing says."""
        messages = _messages(self.model, model)
        if not messages:
            return None
        stacks = _messages(messages[0], stack)
        name = _last(stacks[0], "activation") if stacks else None
        return "relu" if name is None else str(name).strip().removeprefix("nn.").lower() or "linear"


def read_groups(source: TrainerTensors, family: Architecture) -> Groups:
    """Take the tables, and put the features in order.

    Raises:
        ArchitectureError: pipeline.config does not describe the features of these tables.
        ConfigError: The user's features do not fit the tables.
    """
    tables = {}
    for name in source.tensors:
        match = _TABLE.fullmatch(name)
        if match is not None:
            tables[match[1]] = source.table(match[1], source.take(name, None, None))
    document = source.checkpoint.documents.get("pipeline.config")
    if isinstance(document, dict) and source.config.features is None:
        return _described(source, document, tables)
    features, facts = infer_features(
        list(tables), ordered=source.checkpoint.ordered, family=family, config=source.config
    )
    source.facts += facts
    return Groups(
        tables=tuple(tables.values()),
        features=features,
        sparse=tuple(Field(name=f.name, table=f.table, dim=tables[f.table].dim) for f in features),
        num_dense=None,
        model={},
    )


def _described(
    source: TrainerTensors, document: Mapping[str, Any], tables: Mapping[str, TableSpec]
) -> Groups:
    settings = {
        str(_last(message, "feature_name")): message
        for entry in _messages(document, "feature_configs")
        for kind in entry
        for message in _messages(entry, kind)
    }
    model = _messages(document, "model_config")
    groups = {
        str(_last(group, "group_name")): group
        for group in _messages(model[0] if model else {}, "feature_groups")
    }
    if not groups or not settings:
        raise source.refuse(
            "pipeline.config describes no feature groups",
            expected="feature_configs, and feature_groups in model_config",
            hint="take the pipeline.config that the training wrote into its model folder",
        )
    sparse = "sparse" if "sparse" in groups else next(iter(groups))
    fields = _fields(source, groups[sparse], settings, tables)
    dense = 0
    if "dense" in groups and sparse != "dense":
        dense = sum(field.dim for field in _fields(source, groups["dense"], settings, tables))
    source.fact("features", f"group {sparse!r}, {len(fields)} features", "read", "pipeline.config")
    return Groups(
        tables=tuple(tables.values()),
        features=tuple(
            FeatureSpec(
                name=field.name,
                table=field.table,
                pooling=_pooling(source, field.name, settings[field.name]),
            )
            for field in fields
            if field.table is not None
        ),
        sparse=fields,
        num_dense=dense,
        model=model[0],
    )


def _fields(
    source: TrainerTensors,
    group: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, TableSpec],
) -> tuple[Field, ...]:
    """List the features of a group; what has no table is dense, if its kind may be."""
    suffix = _last(group, "embedding_name_suffix")
    fields = []
    if "sequence_groups" in group:
        raise source.refuse(
            "a feature group with sequences",
            expected="groups of features that are pooled",
            hint="sequence encoders cannot be converted yet",
        )
    for name in map(str, group.get("feature_names", [])):
        setting = settings.get(name)
        if setting is None:
            source.missing.append(f"feature_configs of {name} in pipeline.config")
            continue
        table = str(_last(setting, "embedding_name") or f"{name}_emb")
        table += f"_{suffix}" if suffix else ""
        if table in tables:
            fields.append(Field(name=name, table=table, dim=tables[table].dim))
        elif _last(setting, "embedding_dim"):
            source.missing.append(f"the table {table} of feature {name}")
        else:
            width = _last(setting, "value_dim")
            fields.append(
                Field(name=name, table=None, dim=width if isinstance(width, int) and width else 1)
            )
    return tuple(fields)


def _pooling(source: TrainerTensors, name: str, setting: Mapping[str, Any]) -> Pooling:
    given = source.config.pooling
    if given is not None:
        return given if isinstance(given, str) else given.get(name, "sum")
    value = str(_last(setting, "pooling") or "sum").lower()
    if value not in ("sum", "mean"):
        raise source.refuse(
            f"feature {name} is pooled by {value}",
            expected="sum or mean",
            hint="other poolings cannot be converted",
        )
    return cast(Pooling, value)


def _messages(message: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return all values of a field that are messages."""
    values = message.get(name)
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _last(message: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field that occurs once (the last one counts), None without one."""
    values = message.get(name)
    return values[-1] if isinstance(values, list) and values else None
