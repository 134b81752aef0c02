"""Flat models and towers, made of table shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dmt_convert.spec import (
    FeatureSpec,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
    TowerAssignment,
)

MakeModel = Callable[..., tuple[ModelSpec, TowerAssignment]]


def _make_model(
    towers: Sequence[Sequence[tuple[int, int]]],
    *,
    shared: Sequence[int] = (),
    dtype: str = "fp32",
) -> tuple[ModelSpec, TowerAssignment]:
    """Make a model with a table per (rows, dim), by tower.

    Tables are named t0, t1, ... and looked up by f0, f1, ...; a table whose index is in `shared`
    also by g<index>, in the same tower.
    """
    shapes = [(shape, tower) for tower, of_tower in enumerate(towers) for shape in of_tower]
    tables, features = [], []
    members: list[list[str]] = [[] for _ in towers]
    for i, ((rows, dim), tower) in enumerate(shapes):
        tables.append(TableSpec(name=f"t{i}", rows=rows, dim=dim, dtype=dtype))  # type: ignore[arg-type]
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


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    return _make_model
