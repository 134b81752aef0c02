"""From look-up calls to features and tables: which input's column is looked up in which rows.

Tables that the same features are looked up in become one table, side by side: a linear term beside
an embedding, for example. A tensor that several features use with an offset each is cut into one
table per feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from dmt_convert.capture.captured import FeaturePlan, TablePart, TablePlan
from dmt_convert.capture.lookups import Call
from dmt_convert.capture.raw_inputs import Inputs
from dmt_convert.capture.sources import Places
from dmt_convert.capture.tracing import Trace
from dmt_convert.errors import ArchitectureError
from dmt_convert.spec import Pooling

_POOLINGS: Final[Mapping[str, Pooling]] = {
    "SUM": "sum",
    "MEAN": "mean",
    "sum": "sum",
    "mean": "mean",
}


class Key(NamedTuple):
    """What makes a feature: ids of the same place, pooled in the same way."""

    source: int
    """Index of the input."""
    columns: tuple[int, ...]
    """Columns whose ids make a bag; for a jagged input, the index of its key."""
    pooling: Pooling
    """How rows become one vector; sum for one id."""
    single: bool
    """Whether it is one id."""
    padding: int | None
    """Id that stands for no id."""


class Use(NamedTuple):
    """One vector that a call looks up."""

    key: Key
    weight: str
    begin: int
    rows: int
    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """What a call gives, made of features."""

    vectors: tuple[tuple[int, range], ...]
    """Feature and its columns, vector by vector."""
    shape: tuple[int, ...] | None
    """Shape of a row in front of the embedding dim; None: the vectors side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The features, and what every call gives."""

    features: tuple[FeaturePlan, ...]
    """The features, in the order of their first look-up."""
    calls: tuple[LookedUp | None, ...]
    """What each call gives; None: it stays in the graph."""

    @property
    def tables(self) -> frozenset[str]:
        """Weights that are tables."""
        return frozenset(part.weight for f in self.features for part in f.table.parts)

    @property
    def columns(self) -> frozenset[tuple[int, int]]:
        """Inputs and their columns that are ids."""
        return frozenset((f.source, column) for f in self.features for column in f.columns)


@dataclass(slots=True)
class _Group:
    """Parts that become one table."""

    parts: dict[TablePart, None] = field(default_factory=dict)
    keys: dict[Key, None] = field(default_factory=dict)


def plan_front(
    trace: Trace, places: Places, calls: Sequence[Call], inputs: Inputs, module: nn.Module
) -> Front:
    """Find the features and tables of a traced module.

    Args:
        trace: The module.
        places: Where its ids come from.
        calls: The calls, as recorded.
        inputs: What it was called with.
        module: The module.

    Raises:
        ArchitectureError: Ids are not columns of the inputs, or tables do not fit together.
    """
    names = _names_of_weights(module)
    uses: list[list[Use]] = []
    shapes: list[tuple[int, ...] | None] = []
    for i, call in enumerate(calls):
        shapes.append(None)
        uses.append([])
        if trace.looked[i] is None:
            continue
        if call.kind == "collection":
            uses[-1] = _collection_uses(call, inputs, names)
        else:
            uses[-1], shapes[-1] = _tensor_uses(call, trace, places, names, i)
    found = [use for call in uses for use in call]
    parts = _cut(found)
    groups = _group(found, parts)
    tables = _name_tables(groups, inputs)
    keys = list(dict.fromkeys(use.key for use in found))
    table_of = {key: tables[id(group)] for group in groups for key in group.keys}
    features = tuple(_feature(key, table_of[key], inputs) for key in keys)
    _check_names(features)
    index = {key: i for i, key in enumerate(keys)}
    looked = [
        LookedUp(
            vectors=tuple((index[u.key], table_of[u.key].columns_of(parts[u])) for u in call),
            shape=shape,
        )
        for call, shape in zip(uses, shapes, strict=True)
    ]
    given = [trace.looked[i] is not None for i in range(len(calls))]
    return Front(
        features=features,
        calls=tuple(x if is_given else None for x, is_given in zip(looked, given, strict=True)),
    )


def _names_of_weights(module: nn.Module) -> dict[int, str]:
    """id(parameter) -> its first name."""
    names: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), name)
    return names


def _tensor_uses(
    call: Call, trace: Trace, places: Places, names: Mapping[int, str], index: int
) -> tuple[list[Use], tuple[int, ...] | None]:
    """Return the vectors that a call of an embedding or of a bag looks up."""
    what, ids = f"the look-up {call.name!r}", trace.ids[index]
    assert ids is not None and isinstance(call.module, nn.Embedding | nn.EmbeddingBag)
    origin = places.ids(ids, what)
    weight = call.module.weight
    if id(weight) not in names:
        raise ArchitectureError(
            f"the table of {what} is computed from other tensors",
            expected="a table that is a parameter",
            hint="remove its parametrization: torch.nn.utils.parametrize.remove_parametrizations",
        )
    rows, dim = weight.shape
    bag = isinstance(call.module, nn.EmbeddingBag)
    pairs = list(zip(origin.source, origin.column, origin.added, strict=True))
    if not bag or (len(pairs) == 1 and call.module.padding_idx is None):
        keys = [(Key(s, (c,), "sum", True, None), added) for s, c, added in pairs]
        shape = None if bag else origin.shape
    else:
        shape = None
        if len({(s, added) for s, _, added in pairs}) != 1:
            raise ArchitectureError(
                f"{what} pools ids of several inputs",
                expected="bags that are columns of one input",
            )
        source, _, added = pairs[0]
        padding = call.module.padding_idx
        kept = None if padding is None else int(padding) - added
        columns = tuple(c for _, c, _ in pairs)
        mode = _POOLINGS[str(call.module.mode)]
        keys = [(Key(source, columns, mode, False, kept), added)]
    if any(not 0 <= added < rows for _, added in keys):
        raise ArchitectureError(f"{what} adds numbers to its ids that are outside its table")
    return [Use(key, names[id(weight)], added, rows, dim) for key, added in keys], shape


def _collection_uses(call: Call, inputs: Inputs, names: Mapping[int, str]) -> list[Use]:
    """Return the vectors that a TorchRec collection looks up."""
    source = _jagged_source(call, inputs)
    keys: list[str] = list(inputs.raw[source].value.keys())
    collection: Any = call.module
    uses = []
    for config in collection.embedding_bag_configs():
        weight = collection.embedding_bags[config.name].weight
        pooling = _POOLINGS[config.pooling.name]
        for feature in config.feature_names:
            key = Key(source, (keys.index(feature),), pooling, False, None)
            uses.append(Use(key, names[id(weight)], 0, *weight.shape))
    return uses


def _jagged_source(call: Call, inputs: Inputs) -> int:
    for i, entry in enumerate(inputs.raw):
        same = entry.is_jagged and list(entry.value.keys()) == list(call.ids.keys())
        if same and all(
            a.data_ptr() == b.data_ptr() and a.shape == b.shape
            for a, b in (
                (entry.value.values(), call.ids.values()),
                (entry.value.lengths(), call.ids.lengths()),
            )
        ):
            return i
    raise ArchitectureError(
        f"the look-up {call.name!r} is not called with an input of the module as it is",
        expected="a KeyedJaggedTensor that is handed on unchanged",
        hint="permute or split it in the data",
    )


def _cut(uses: Sequence[Use]) -> dict[Use, TablePart]:
    """Cut tensors where the features' rows begin."""
    begins: dict[str, set[int]] = {}
    for use in uses:
        begins.setdefault(use.weight, set()).add(use.begin)
    ends = {
        weight: dict(zip(sorted(found), sorted(found)[1:], strict=False))
        for weight, found in begins.items()
    }
    return {
        use: TablePart(
            weight=use.weight,
            begin=use.begin,
            end=ends[use.weight].get(use.begin, use.rows),
            dim=use.dim,
        )
        for use in uses
    }


def _group(uses: Sequence[Use], parts: Mapping[Use, TablePart]) -> list[_Group]:
    """Put parts together that a feature needs together.

    Raises:
        ArchitectureError: Such parts do not have the same number of rows.
    """
    groups: list[_Group] = []
    for use in uses:
        part = parts[use]
        met = [group for group in groups if part in group.parts or use.key in group.keys]
        joined = _Group()
        for group in met:
            joined.parts |= group.parts
            joined.keys |= group.keys
        joined.parts[part] = joined.keys[use.key] = None
        groups = (
            [joined if group is met[0] else group for group in groups]
            if met
            else [
                *groups,
                joined,
            ]
        )
        groups = [group for group in groups if group is joined or group not in met]
    for group in groups:
        rows = {part.weight: part.rows for part in group.parts}
        if len({*rows.values()}) > 1:
            raise ArchitectureError(
                "one input is looked up in tables of different sizes: "
                + ", ".join(f"{name} has {count} rows" for name, count in rows.items()),
                expected="as many rows in each: they become one table, side by side",
                hint="make the tables equally large, or describe the model by an ADAPTER",
            )
    return groups


def _name_tables(groups: Sequence[_Group], inputs: Inputs) -> dict[int, TablePlan]:
    """Name tables by their only feature, or by their first tensor."""
    taken: set[str] = set()
    tables: dict[int, TablePlan] = {}
    for group in groups:
        first = next(iter(group.parts))
        module = first.weight.removesuffix(".weight").rpartition("embedding_bags.")[2]
        name = _name_key(next(iter(group.keys)), inputs) if len(group.keys) == 1 else module
        name = base = _plain(name)
        count = 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        tables[id(group)] = TablePlan(name=name, parts=tuple(group.parts))
    return tables


def _feature(key: Key, table: TablePlan, inputs: Inputs) -> FeaturePlan:
    return FeaturePlan(
        name=_plain(_name_key(key, inputs)),
        table=table,
        pooling=key.pooling,
        source=key.source,
        columns=key.columns,
        single=key.single,
        padding=key.padding,
    )


def _name_key(key: Key, inputs: Inputs) -> str:
    entry = inputs.raw[key.source]
    if entry.is_jagged:
        return str(entry.value.keys()[key.columns[0]])
    width = int(torch.Size(entry.value.shape[1:]).numel())
    if key.columns == tuple(range(width)):
        return entry.name
    names = [column_name(entry.name, width, column) for column in key.columns]
    return names[0] if len(names) == 1 else f"{names[0]}_to_{key.columns[-1]}"


def column_name(name: str, width: int, column: int) -> str:
    """Name a column of an input: as the input if it is the only one."""
    return _plain(name if width == 1 else f"{name}_{column}")


def _plain(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z_-]+", "_", name)


def _check_names(features: Sequence[FeaturePlan]) -> None:
    names = [feature.name for feature in features]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArchitectureError(
            f"several features would be called {', '.join(twice)}",
            expected="inputs with different names, each looked up in one way",
            hint="give one input per way: a data set has one column per feature",
        )
