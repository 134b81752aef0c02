"""Start of a converted model with dot interaction.

Letters: n rows, V vectors paired in the flat model (dense first), K those of the converted one,
N embedding dim, D output dim, H over_arch's first outputs; c and p as in DESIGN section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.initialisation.dot_start import (
    fit_combinations,
    fit_projections,
    second_moments,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.start import Start
from dmt_convert.model import DmtSpec, pair_indices

Array = npt.NDArray[np.float64]
_FLOOR = 1e-3


def start_dot(trace: FlatTrace, spec: DmtSpec) -> Start:
    """Choose projections and combinations, and carry over_arch's columns over.

    over_arch itself is refitted afterwards, on what these projections give.
    """
    flat = spec.flat
    slots = max(1, spec.towers[0].module.c)
    vectors = trace.inputs.reshape(len(trace.dense), len(flat.input_dims), -1)
    moments = second_moments(vectors)
    pairs = _pair_matrix(trace, spec)
    position = {name: i + 1 for i, name in enumerate(flat.feature_names)}
    widths = [spec.dense_dim] * len(vectors[0])
    for tower in spec.towers:
        for name in tower.features:
            widths[position[name]] = tower.module.dim
    limit = flat.input_dims[0]
    fitted = fit_projections(
        moments, pair_importance(trace), [min(slots * k, limit) for k in widths]
    )
    projections = np.zeros((*fitted.shape[:2], slots * spec.dense_dim))
    projections[:, :, : fitted.shape[2]] = fitted
    norms = np.sqrt(np.trace(moments, axis1=1, axis2=2))
    modules, combos = [], []
    for tower in spec.towers:
        module = tower.module
        members = np.array([position[name] for name in tower.features])
        emit = projections[members][:, :, _slot_columns(slots, module.dim)]
        state: dict[str, Array] = {}
        if module.c:
            state["feature_weight"] = emit.reshape(-1, emit.shape[2])
            state["feature_bias"] = np.zeros((len(members), emit.shape[2]))
        if module.p:
            combo = fit_combinations(pairs, norms, members, module.p)
            leading = projections[members][:, :, : module.dim].transpose(0, 2, 1)
            state["tower_weight"] = np.concatenate(
                [combo[:, m, None, None] * part for m, part in zip(members, leading, strict=True)],
                axis=2,
            ).reshape(module.p * module.dim, -1)
            state["tower_bias"] = np.zeros(module.p * module.dim)
            combos.append(combo)
        modules.append(state)
    dense = {"over_arch.0.weight": _carry_columns(trace, spec, pairs, position, combos)}
    if spec.dense_dim != flat.input_dims[0]:
        columns = _slot_columns(slots, spec.dense_dim)[: spec.dense_dim]
        dense["dense_projection.weight"] = projections[0][:, columns].T
        dense["dense_projection.bias"] = np.zeros(spec.dense_dim)
    return Start(modules=modules, dense=dense)


def _slot_columns(slots: int, dim: int) -> npt.NDArray[np.intp]:
    """Coordinates that a feature's vectors emit, one vector (slot) after the other.

    Coordinate k lies in slot k mod c, so that towers of different D agree on all that both emit.
    """
    return np.arange(slots * dim).reshape(dim, slots).T.reshape(-1)


def _pair_matrix(trace: FlatTrace, spec: DmtSpec) -> Array:
    """over_arch's first layer as W[h, i, j], symmetric in i and j, shape (H, V, V)."""
    weight = trace.weights["over_arch.0.weight"].astype(np.float64)
    count = len(spec.flat.input_dims)
    left, right = (index.numpy() for index in pair_indices(count, spec.flat.interaction))
    matrix = np.zeros((len(weight), count, count))
    columns = weight[:, spec.flat.input_dims[0] :]
    matrix[:, left, right] = columns
    matrix[:, right, left] = columns
    return matrix


def pair_importance(trace: FlatTrace) -> Array:
    """How much the logit feels an error in each pair: its mean square gradient, shape (V, V)."""
    flat = trace.spec
    count = len(flat.input_dims)
    left, right = (index.numpy() for index in pair_indices(count, flat.interaction))
    squares = trace.interaction_gradient[flat.input_dims[0] :]
    importance = np.zeros((count, count))
    importance[left, right] = importance[right, left] = squares
    floor = _FLOOR * float(squares.mean()) if squares.size else 0.0
    importance += floor if floor > 0 else 1.0
    np.fill_diagonal(importance, 0.0)
    return importance


def _carry_columns(
    trace: FlatTrace,
    spec: DmtSpec,
    pairs: Array,
    position: dict[str, int],
    combos: list[Array],
) -> Array:
    """Weights for the converted pairs that mean what the flat ones meant."""
    module = spec.towers[0].module
    origin, slot = [0], [0]
    for tower in spec.towers:
        for name in tower.features if module.c else ():
            origin += [position[name]] * module.c
            slot += list(range(module.c))
        origin += [-1] * module.p
        slot += [-1] * module.p
    left, right = (i.numpy() for i in pair_indices(len(origin), spec.interaction))
    source, kind = np.array(origin), np.array(slot)
    if module.c:
        values = pairs[:, source[left], source[right]]
        same = (kind[left] == kind[right]) & (kind[left] >= 0)
        distinct = (source[left] != source[right]) | (left == right)
        values = np.where(same & distinct, values, 0.0)
    else:
        values = _combined_pairs(pairs, combos)[:, left, right]
        own = left == right
        values[:, own] /= 2
    dense = trace.weights["over_arch.0.weight"][:, : spec.flat.input_dims[0]]
    return np.concatenate([dense.astype(np.float64), values], axis=1)


def _combined_pairs(pairs: Array, combos: list[Array]) -> Array:
    """Rewrite W for vectors that are combinations: A^T W A with A the pseudo-inverse.

    Twice the quadratic form: W holds a pair of different vectors twice, so a self-pair counts
    double as well; the caller halves the diagonal.
    """
    doubled = pairs * (1 + np.eye(pairs.shape[1]))
    dense = np.zeros((1, pairs.shape[1]))
    dense[0, 0] = 1.0
    back = np.linalg.pinv(np.concatenate([dense, *combos]))
    combined: Array = np.einsum("fk,hfg,gl->hkl", back, doubled, back, optimize=True)
    return combined
