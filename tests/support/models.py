"""Small models with weights, and samples of their inputs."""

from __future__ import annotations

import numpy as np
import torch

from dmt_convert.conversion import Sample
from dmt_convert.model import DmtModel, DmtSpec, FlatModel, TowerModuleSpec, TowerSpec, module_spec
from dmt_convert.spec import ModelSpec
from support.rows import build_batch
from support.specs import click_spec


def split_towers(spec: ModelSpec, count: int, module: TowerModuleSpec) -> DmtSpec:
    """Feature i sits in tower i mod `count`."""
    return DmtSpec(
        flat=spec,
        towers=tuple(
            TowerSpec(features=spec.feature_names[t::count], module=module) for t in range(count)
        ),
    )


def build_model(spec: ModelSpec | None = None, *, seed: int = 0) -> DmtModel:
    """A random model in two towers, its tables in memory; that of `click_spec` unless given."""
    spec = spec or click_spec()
    torch.manual_seed(seed)
    return DmtModel(split_towers(spec, 2, module_spec(spec, "passthrough", num_towers=2)))


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
