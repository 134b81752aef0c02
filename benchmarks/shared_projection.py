"""The rival of the closed form for dot interaction: one projection shared by all vectors.

P holds the leading eigenvectors of the second moment of the embeddings that inputs look up, summed
over features; every feature and the dense vector are projected by it, and over_arch stays as it is.
Letters: V vectors that are paired (the dense one first), N embedding dim, D output dim.
"""

from __future__ import annotations

import numpy as np
import torch

from dmt_convert.conversion import Sample
from dmt_convert.conversion.initialisation import initialise
from dmt_convert.model import DmtModel, DmtSpec, FlatModel, pair_indices


def convert_shared(flat: FlatModel, spec: DmtSpec, sample: Sample) -> DmtModel:
    """Convert a model with dot interaction, c = 1, p = 0 and one D."""
    module = spec.towers[0].module
    assert (module.c, module.p) == (1, 0) and len({t.module.dim for t in spec.towers}) == 1
    model, _ = initialise(flat, spec, None, method="random")
    projection = _leading(sample, spec)[:, : module.dim]
    state = {
        "over_arch.0.weight": _carry(flat, spec),
        "over_arch.0.bias": flat.state_dict()["over_arch.0.bias"],
    }
    for t, tower in enumerate(spec.towers):
        count = len(tower.features)
        state[f"towers.{t}.tower_module.feature_weight"] = projection.repeat(count, 1)
        state[f"towers.{t}.tower_module.feature_bias"] = torch.zeros(count, module.dim)
    if model.dense_projection is not None:
        state["dense_projection.weight"] = projection.T
        state["dense_projection.bias"] = torch.zeros(module.dim)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return model


def _leading(sample: Sample, spec: DmtSpec) -> torch.Tensor:
    """Eigenvectors of the summed second moment as columns, the leading one first, (N, N)."""
    vectors = sample.pooled.reshape(-1, spec.flat.input_dims[0]).astype(np.float64)
    _, columns = np.linalg.eigh(vectors.T @ vectors)
    return torch.from_numpy(columns[:, ::-1].astype(np.float32).copy())


def _carry(flat: FlatModel, spec: DmtSpec) -> torch.Tensor:
    """over_arch's first weight with its pairs in the order of the towers' vectors."""
    weight, dense = flat.state_dict()["over_arch.0.weight"], spec.flat.input_dims[0]
    count = len(spec.flat.input_dims)
    flat_pairs = spec.flat.interaction
    left, right = pair_indices(count, flat_pairs.pair_order, self_pairs=flat_pairs.self_pairs)
    pairs = torch.zeros(len(weight), count, count)
    pairs[:, left, right] = pairs[:, right, left] = weight[:, dense:]
    position = {name: i + 1 for i, name in enumerate(spec.flat.feature_names)}
    order = torch.tensor([0, *(position[name] for tower in spec.towers for name in tower.features)])
    # the converted model pairs its vectors in the same order
    return torch.cat([weight[:, :dense], pairs[:, order[left], order[right]]], dim=1)
