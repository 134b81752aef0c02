"""Tiny specs and planted samples, shared by the partition tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from dmt_convert.spec import (
    FeatureSpec,
    InteractionKind,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    PairOrder,
    TableSpec,
)

SpecMaker = Callable[..., ModelSpec]


def build_spec(
    count: int,
    *,
    dims: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    shared: Mapping[int, int] | None = None,
    kind: InteractionKind = "cat",
    hidden: int = 5,
    self_pairs: bool = False,
    pair_order: PairOrder = "triu",
    names: Sequence[str] | None = None,
) -> ModelSpec:
    """A model of `count` features; `shared` maps a feature to the one whose table it uses."""
    names = names or [f"f{i}" for i in range(count)]
    dims = dims or [4] * count
    shared = shared or {}
    interaction = InteractionSpec(kind=kind, self_pairs=self_pairs, pair_order=pair_order)
    if kind == "dcn":
        interaction = InteractionSpec(kind="dcn", cross_layers=2, cross_rank=3)
    if kind == "projection":
        width = dims[0] * (count + 1)
        interaction = InteractionSpec(
            kind="projection",
            branch1=MlpSpec(widths=(width, 6, 2 * dims[0]), final_relu=True),
            branch2=MlpSpec(widths=(width, 5, 3 * dims[0]), final_relu=True),
        )
    width = interaction.output_width((dims[0], *dims))
    return ModelSpec(
        family="test",
        tables=tuple(
            TableSpec(name=f"t{i}", rows=rows[i] if rows else 10, dim=dims[i])
            for i in range(count)
            if i not in shared
        ),
        features=tuple(
            FeatureSpec(name=names[i], table=f"t{shared.get(i, i)}") for i in range(count)
        ),
        dense_arch=MlpSpec(widths=(3, dims[0]), final_relu=True),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, hidden, 1), final_relu=False),
    )


def plant_samples(
    truth: Sequence[int], *, rows: int = 64, dim: int = 16, noise: float = 1.5, seed: int = 0
) -> list[np.ndarray]:
    """Pooled embeddings that share a direction per row with the features of their group."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(truth) + 1, rows, dim))
    return [
        (centres[t] + noise * rng.standard_normal((rows, dim))).astype(np.float32) for t in truth
    ]


def random_affinity(count: int, seed: int = 0) -> np.ndarray:
    """A symmetric matrix in [0, 1] with diagonal 1."""
    matrix = np.random.default_rng(seed).random((count, count)).astype(np.float32)
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


@pytest.fixture(scope="session")
def make_spec() -> SpecMaker:
    return build_spec


@pytest.fixture(scope="session")
def plant() -> Callable[..., list[np.ndarray]]:
    return plant_samples


@pytest.fixture(scope="session")
def make_affinity() -> Callable[..., np.ndarray]:
    return random_affinity
