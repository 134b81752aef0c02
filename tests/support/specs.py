"""Specs of small flat models: numbers, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmt_convert.spec import (
    FeatureSpec,
    InteractionKind,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
    TowerAssignment,
)

CLICK_ROWS = (7, 50, 11, 6)
"""Rows of the tables of tiny models, and limits of the ids in tiny data sets."""
CLICK_NAMES = tuple(f"cat_{i}" for i in range(len(CLICK_ROWS)))


def build_spec(
    features: int | Sequence[str] | None = None,
    *,
    kind: InteractionKind = "cat",
    dims: int | Sequence[int] = 8,
    rows: int | Sequence[int] = 40,
    dense: Sequence[int] = (4, 6),
    dense_dim: int | None = None,
    hidden: Sequence[int] = (12,),
    pooling: Any = "sum",
    shared: Mapping[int, int] | None = None,
    family: str = "test",
    **interaction: Any,
) -> ModelSpec:
    """A flat model; feature f0 looks up table t0, f1 looks up t1, ...

    Args:
        features: how many, or their names; as many as `dims`, or five, unless given.
        kind: of the interaction.
        dims: of the tables, one for all or one each.
        rows: of the tables, one for all or one each.
        dense: widths of dense_arch but for the last, the number of dense inputs first.
        dense_dim: last width of dense_arch; that of the first table unless given.
        hidden: widths of over_arch between the interaction and the logit.
        pooling: of all features.
        shared: maps a feature to the one whose table it uses.
        family: of the model.
        interaction: further fields of the interaction.
    """
    if features is None:
        features = 5 if isinstance(dims, int) else len(dims)
    names = [f"f{i}" for i in range(features)] if isinstance(features, int) else features
    dims = [dims] * len(names) if isinstance(dims, int) else dims
    rows = [rows] * len(names) if isinstance(rows, int) else rows
    shared = shared or {}
    last = dense_dim or dims[0]
    total = last + sum(dims)
    if kind == "dcn":
        interaction = {"cross_layers": 2, "cross_rank": 5, **interaction}
    if kind == "projection":
        interaction = {
            "branch1": MlpSpec(widths=(total, 7, 2 * last), final_relu=True),
            "branch2": MlpSpec(widths=(total, 6, 3 * last), final_relu=True),
            **interaction,
        }
    spec = InteractionSpec(kind=kind, **interaction)
    return ModelSpec(
        family=family,
        tables=tuple(
            TableSpec(name=f"t{i}", rows=rows[i], dim=dims[i])
            for i in range(len(names))
            if i not in shared
        ),
        features=tuple(
            FeatureSpec(name=name, table=f"t{shared.get(i, i)}", pooling=pooling)
            for i, name in enumerate(names)
        ),
        dense_arch=MlpSpec(widths=(*dense, last), final_relu=True),
        interaction=spec,
        over_arch=MlpSpec(widths=(spec.output_width((last, *dims)), *hidden, 1), final_relu=False),
    )


def click_spec(
    *, rows: tuple[int, ...] = CLICK_ROWS, dims: Sequence[int] = (8, 8, 4, 8), pooling: Any = "sum"
) -> ModelSpec:
    """A cat model for the rows of `support.rows.write_clicks`."""
    return build_spec(
        CLICK_NAMES,
        dims=dims,
        rows=rows,
        dense=(5,),
        hidden=(8,),
        pooling=pooling,
        family="torchrec-dlrm",
    )


def mlperf_spec(
    features: int = 32, dim: int = 128, *, kind: InteractionKind = "dot", rows: int = 10_000
) -> ModelSpec:
    """A model with the MLPs of MLPerf's DLRM."""
    more: dict[str, Any] = {}
    if kind == "projection":
        branch = MlpSpec(widths=((features + 1) * dim, 64, 4 * dim), final_relu=True)
        more = {"branch1": branch, "branch2": branch}
    elif kind == "dcn":
        more = {"cross_layers": 3, "cross_rank": 64}
    return build_spec(
        features,
        kind=kind,
        dims=dim,
        rows=rows,
        dense=(13, 512, 256),
        hidden=(1024, 1024, 512, 256),
        **more,
    )


def spec_of_towers(
    towers: Sequence[Sequence[tuple[int, int]]],
    *,
    shared: Sequence[int] = (),
    dtype: Any = "fp32",
) -> tuple[ModelSpec, TowerAssignment]:
    """A cat model with a table per (rows, dim), by tower.

    Tables are named t0, t1, ... and looked up by f0, f1, ...; a table whose index is in `shared`
    also by g<index>, in the same tower.
    """
    shapes = [(shape, tower) for tower, of_tower in enumerate(towers) for shape in of_tower]
    tables, features = [], []
    members: list[list[str]] = [[] for _ in towers]
    for i, ((rows, dim), tower) in enumerate(shapes):
        tables.append(TableSpec(name=f"t{i}", rows=rows, dim=dim, dtype=dtype))
        for name in [f"f{i}"] + [f"g{i}"] * (i in shared):
            features.append(FeatureSpec(name=name, table=f"t{i}"))
            members[tower].append(name)
    dims = {table.name: table.dim for table in tables}
    width = 8 + sum(dims[feature.table] for feature in features)
    spec = ModelSpec(
        family="test",
        tables=tuple(tables),
        features=tuple(features),
        dense_arch=MlpSpec(widths=(4, 8), final_relu=True),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(width, 1), final_relu=False),
    )
    return spec, TowerAssignment(towers=tuple(map(tuple, members)))
