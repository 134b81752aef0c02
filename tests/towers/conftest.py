"""Small flat models with planted spectra, and samples of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmt_convert.conversion import Sample
from dmt_convert.data import Bag, Batch
from dmt_convert.model import DmtSpec, FlatModel, TowerModuleSpec, TowerSpec
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec


def build_spec(
    kind: str = "dot",
    *,
    dims: Sequence[int] = (8, 8, 8, 8, 8),
    dense: int = 8,
    hidden: tuple[int, ...] = (12,),
    rows: int = 40,
    pooling: str = "sum",
    **interaction: object,
) -> ModelSpec:
    """A flat model; its tables serve one feature each."""
    total = dense + sum(dims)
    if kind == "dcn":
        interaction = {"cross_layers": 2, "cross_rank": 5, **interaction}
    if kind == "projection":
        interaction = {
            "branch1": MlpSpec(widths=(total, 7, 2 * dense), final_relu=True),
            "branch2": MlpSpec(widths=(total, 6, 3 * dense), final_relu=True),
        }
    spec = InteractionSpec(kind=kind, **interaction)
    return ModelSpec(
        family="test",
        tables=tuple(TableSpec(name=f"t{i}", rows=rows, dim=d) for i, d in enumerate(dims)),
        features=tuple(
            FeatureSpec(name=f"f{i}", table=f"t{i}", pooling=pooling) for i in range(len(dims))
        ),
        dense_arch=MlpSpec(widths=(4, 6, dense), final_relu=True),
        interaction=spec,
        over_arch=MlpSpec(widths=(spec.output_width((dense, *dims)), *hidden, 1), final_relu=False),
    )


def build_flat(spec: ModelSpec, *, seed: int = 0, decay: float = 0.75) -> FlatModel:
    """A flat model whose tables' spectra decay, with biases and weights of some size."""
    torch.manual_seed(seed)
    model = FlatModel(spec).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.over_arch.parameters():
            parameter.mul_(2.0)
        if spec.interaction.kind == "dot":
            # the pairs, not the dense vector, are what the logit is about
            model.over_arch[0].weight[:, spec.input_dims[0] :] *= 6.0
        for name, value in model.interaction.named_parameters():
            if name.endswith("bias"):
                value.copy_(torch.randn(value.shape) * 0.1)
        for table in spec.tables:
            axes = np.linalg.qr(rng.standard_normal((table.dim, table.dim)))[0]
            if spec.interaction.kind == "dcn":
                axes = np.eye(table.dim)[rng.permutation(table.dim)]
            values = rng.standard_normal((table.rows, table.dim)) * decay ** np.arange(table.dim)
            mean = 0.3 * rng.standard_normal(table.dim) * decay ** np.arange(table.dim)
            model.tables[table.name].weight.copy_(torch.from_numpy((values + mean) @ axes))
    return model.requires_grad_(False)


def build_batch(
    spec: ModelSpec, rows: int, *, seed: int = 0, multi: bool = False, weighted: bool = False
) -> Batch:
    """Random rows; `multi`: bags of 0 to 3 ids."""
    rng = np.random.default_rng((seed, 7))
    bags = []
    for feature in spec.features:
        lengths = rng.integers(0, 4, rows) if multi else np.ones(rows, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = rng.integers(0, spec.table_of(feature.name).rows, int(offsets[-1]))
        weights = rng.random(len(values)).astype(np.float32) if weighted else None
        bags.append(Bag(values=values.astype(np.int64), offsets=offsets, weights=weights))
    dense = rng.standard_normal((rows, spec.num_dense)).astype(np.float32)
    return Batch(dense=dense, feature_names=spec.feature_names, bags=tuple(bags))


def build_sample(model: FlatModel, rows: int, *, seed: int = 0, multi: bool = False) -> Sample:
    """Random rows with the embeddings that the model pools."""
    batch = build_batch(model.spec, rows, seed=seed, multi=multi)
    pooled = [
        model.tables(name, bag).numpy()
        for name, bag in zip(batch.feature_names, batch.bags, strict=True)
    ]
    return Sample(
        batch=batch, pooled=np.concatenate(pooled, axis=1), source="tables", description="random"
    )


def split_towers(spec: ModelSpec, count: int, module: TowerModuleSpec) -> DmtSpec:
    """Feature i sits in tower i mod `count`."""
    return DmtSpec(
        flat=spec,
        towers=tuple(
            TowerSpec(features=spec.feature_names[t::count], module=module) for t in range(count)
        ),
    )


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """All builders."""
    builders: dict[str, Callable[..., object]] = {
        "spec": build_spec,
        "flat": build_flat,
        "batch": build_batch,
        "sample": build_sample,
        "towers": split_towers,
    }
    return SimpleNamespace(**builders)
