"""Closed form for models that pair vectors: projections that keep the dot products.

Letters: n rows, V vectors paired in the flat model (dense first), K those of the converted one,
N embedding dim, D output dim, T towers, H over_arch's first outputs; c and p as in DESIGN
section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import nn

from dmt_convert.arrays import Float32Array, Float64Array, IntArray
from dmt_convert.conversion.initialisation.closed_form import ClosedForm, Indices, Loss, Start
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.model import DmtModel, DmtSpec, pair_indices, to_tensor
from dmt_convert.spec import ModelSpec

_FLOOR: Final = 1e-3
_ITERATIONS: Final = 30
_MAX_ELEMENTS: Final = 1 << 24
"""Elements of second moments up to which output dims are allotted."""


class DotForm(ClosedForm):
    """Projections of single features, combinations of them, and over_arch refitted on those."""

    def fits(self, spec: DmtSpec) -> bool:
        """Dlrm tower modules in front of dot products."""
        return spec.flat.interaction.rules.pairs_vectors and spec.kind == "dlrm"

    def start(self, trace: FlatTrace, spec: DmtSpec) -> Start:
        """Choose projections and combinations, and carry over_arch's columns over."""
        return _start(trace, spec)

    def finish(self, model: DmtModel, trace: FlatTrace, start: Start) -> tuple[str, ...]:
        """Refit over_arch's first layer on the output of the converted interaction."""
        dense = to_tensor(trace.dense)
        inputs = model.interact(dense, model.emit(to_tensor(trace.pooled))).numpy()
        prior = np.asarray(start.dense["over_arch.0.weight"], dtype=np.float64)
        fit = refit_linear(inputs, trace.pre_activation, prior)
        layer = model.over_arch[0]
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(torch.from_numpy(fit.weight.astype(np.float32)))
        layer.bias.copy_(torch.from_numpy(fit.bias.astype(np.float32)))
        return (f"over_arch.0 refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}",)

    def tower_loss(self, trace: FlatTrace, spec: DmtSpec) -> Loss | None:
        """Weighted square error of all dots; a pair keeps the coordinates that both emit."""
        return None if spec.towers[0].module.p else _dot_loss(trace, spec)


def _start(trace: FlatTrace, spec: DmtSpec) -> Start:
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
        state: dict[str, Float64Array] = {}
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


def _slot_columns(slots: int, dim: int) -> Indices:
    """Coordinates that a feature's vectors emit, one vector (slot) after the other.

    Coordinate k lies in slot k mod c, so that towers of different D agree on all that both emit.
    """
    return np.arange(slots * dim).reshape(dim, slots).T.reshape(-1)


def _pairs(count: int, flat: ModelSpec) -> tuple[IntArray, IntArray]:
    """Row and column of every pair of `count` vectors, in the order of the interaction."""
    spec = flat.interaction
    left, right = pair_indices(count, spec.pair_order, self_pairs=spec.self_pairs)
    return left.numpy(), right.numpy()


def _pair_matrix(trace: FlatTrace, spec: DmtSpec) -> Float64Array:
    """over_arch's first layer as W[h, i, j], symmetric in i and j, shape (H, V, V)."""
    weight = trace.weights["over_arch.0.weight"].astype(np.float64)
    count = len(spec.flat.input_dims)
    left, right = _pairs(count, spec.flat)
    matrix = np.zeros((len(weight), count, count))
    columns = weight[:, spec.flat.input_dims[0] :]
    matrix[:, left, right] = columns
    matrix[:, right, left] = columns
    return matrix


def pair_importance(trace: FlatTrace) -> Float64Array:
    """How much the logit feels an error in each pair: its mean square gradient, shape (V, V)."""
    flat = trace.spec
    count = len(flat.input_dims)
    left, right = _pairs(count, flat)
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
    pairs: Float64Array,
    position: dict[str, int],
    combos: list[Float64Array],
) -> Float64Array:
    """Return weights of the converted pairs, which mean the same as the flat ones."""
    module = spec.towers[0].module
    origin, slot = [0], [0]
    for tower in spec.towers:
        for name in tower.features if module.c else ():
            origin += [position[name]] * module.c
            slot += list(range(module.c))
        origin += [-1] * module.p
        slot += [-1] * module.p
    left, right = _pairs(len(origin), spec.flat)
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


def _combined_pairs(pairs: Float64Array, combos: list[Float64Array]) -> Float64Array:
    """Rewrite W for vectors that are combinations: A^T W A with A the pseudo-inverse.

    Twice the quadratic form: W holds a pair of different vectors twice, so a self-pair counts
    double as well; the caller halves the diagonal.
    """
    doubled = pairs * (1 + np.eye(pairs.shape[1]))
    dense = np.zeros((1, pairs.shape[1]))
    dense[0, 0] = 1.0
    back = np.linalg.pinv(np.concatenate([dense, *combos]))
    combined: Float64Array = np.einsum("fk,hfg,gl->hkl", back, doubled, back, optimize=True)
    return combined


def _dot_loss(trace: FlatTrace, spec: DmtSpec) -> Loss | None:
    """Weighted square error of all dots; a pair keeps the coordinates that both emit.

    In the basis of the shared projection, dropping the coordinates from d on costs pair (i, j)
    w_ij sum_(k, l >= d) C_i[k, l] C_j[k, l]; summed over the pairs of two towers that is a table
    over d, shape (N + 1, T + 1, T + 1), the dense vector being a tower of its own.
    """
    count, dim = len(spec.flat.input_dims), spec.flat.input_dims[0]
    if count * dim * dim > _MAX_ELEMENTS:
        return None
    moments = second_moments(trace.inputs.reshape(len(trace.dense), count, -1))
    importance = pair_importance(trace)
    basis = shared_projection(moments, importance)
    turned = np.einsum("ka,vkl,lb->vab", basis, moments, basis, optimize=True)
    tower_of = {name: t + 1 for t, tower in enumerate(spec.towers) for name in tower.features}
    member = np.zeros((len(spec.towers) + 1, count))
    member[0, 0] = 1.0
    for i, name in enumerate(spec.flat.feature_names):
        member[tower_of[name], i + 1] = 1.0
    lost = np.zeros((dim + 1, len(member), len(member)))
    for k in range(dim - 1, -1, -1):
        row, corner = turned[:, k, k + 1 :], turned[:, k, k]
        shell = importance * (np.outer(corner, corner) + 2 * row @ row.T)
        lost[k] = lost[k + 1] + member @ shell @ member.T
    slots = max(1, spec.towers[0].module.c)
    first, second = np.indices(lost.shape[1:])

    def loss(dims: Sequence[int]) -> float:
        kept = np.minimum(dim, slots * np.array([max(dims), *dims]))
        return float(lost[np.minimum(kept[first], kept[second]), first, second].sum())

    return loss


def second_moments(vectors: Float32Array) -> Float64Array:
    """Second moments of every vector: (n, V, N) to (V, N, N)."""
    count, width, dim = vectors.shape
    moments = np.empty((width, dim, dim))
    for i in range(width):
        x = vectors[:, i].astype(np.float64)
        moments[i] = x.T @ x / max(1, count)
    return moments


def fit_projections(
    moments: Float64Array, importance: Float64Array, widths: Sequence[int]
) -> Float64Array:
    """Find projections P_i that keep the dot products of all pairs that matter.

    Minimises sum_ij w_ij E[(e_i^T (I - P_i P_j^T) e_j)^2] for independent e_i, e_j by
    alternating least squares: given all others, P_i = (sum_j w_ij C_j P_j)
    (sum_j w_ij P_j^T C_j P_j)^-1. Starts from one shared P, the leading eigenvectors of
    sum_i w_i C_i, and keeps the best of all rounds, so it is never worse than the shared P.

    Args:
        moments: C_i = E[e_i e_i^T], shape (V, N, N).
        importance: w_ij >= 0, symmetric with zero diagonal, shape (V, V).
        widths: Columns of every P_i, at most N. A narrower vector meets the leading coordinates
            of a wider one.

    Returns:
        P, shape (V, N, largest width), zero beyond a vector's own width.
    """
    count, dim, _ = moments.shape
    width = max(widths)
    if min(widths) >= dim:
        return np.repeat(np.eye(dim)[None], count, axis=0)
    shared = shared_projection(moments, importance)[:, :width]
    own = np.arange(width) < np.asarray(widths)[:, None]
    current = np.where(own[:, None, :], shared, 0.0)
    best, best_loss = current.copy(), pair_loss(moments, importance, current)
    moved = moments @ current  # C_j P_j
    emitted = current.transpose(0, 2, 1) @ moved  # P_j^T C_j P_j
    for _ in range(_ITERATIONS):
        for i in range(count):
            k = widths[i]
            weighted = np.tensordot(importance[i], moved[:, :, :k], axes=1)
            gram = np.tensordot(importance[i], emitted[:, :k, :k], axes=1)
            scale = np.trace(gram) / k
            if scale <= 0:
                continue
            current[i, :, :k] = np.linalg.solve(gram + 1e-9 * scale * np.eye(k), weighted.T).T
            moved[i] = moments[i] @ current[i]
            emitted[i] = current[i].T @ moved[i]
        loss = pair_loss(moments, importance, current)
        if not loss < best_loss:
            break
        done = loss > best_loss * (1 - 1e-4)
        best, best_loss = current.copy(), loss
        if done:
            break
    return _balance(best, moments) if len(set(widths)) == 1 else best


def shared_projection(moments: Float64Array, importance: Float64Array) -> Float64Array:
    """Eigenvectors of sum_i w_i C_i as columns, the leading one first, shape (N, N)."""
    weights = importance.sum(axis=1)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1.0)
    total = np.einsum("i,inm->nm", weights, moments)
    _, vectors = np.linalg.eigh(total)
    leading: Float64Array = vectors[:, ::-1]
    return leading


def pair_loss(moments: Float64Array, importance: Float64Array, projections: Float64Array) -> float:
    """Sum of w_ij tr(C_i E_ij C_j E_ij^T) with E_ij = I - P_i P_j^T, without forming E_ij."""
    cp = moments @ projections
    pcp = projections.transpose(0, 2, 1) @ cp
    flat = moments.reshape(len(moments), -1)
    full = np.sum(importance * (flat @ flat.T))
    # tr(C_i P_i P_j^T C_j): <P_i-weighted moments> contracted pairwise
    left = cp.reshape(len(cp), -1)
    mixed = np.sum(importance * (left @ left.T))
    square = pcp.reshape(len(pcp), -1)
    both = np.sum(importance * (square @ square.transpose(1, 0)))
    return float(full - 2 * mixed + both)


def _balance(projections: Float64Array, moments: Float64Array) -> Float64Array:
    """Give the emitted coordinates of all vectors one common scale and orthogonal axes.

    P_i R and P_j R^-T give the same dot products for any R; an orthogonal R that diagonalises
    the mean moment of what is emitted keeps them and leaves well-conditioned inputs.
    """
    emitted = np.einsum("ind,inm,ime->de", projections, moments, projections, optimize=True)
    _, axes = np.linalg.eigh(emitted)
    balanced: Float64Array = projections @ axes[:, ::-1]
    return balanced


def fit_combinations(
    pair_weights: Float64Array, norms: Float64Array, members: Indices, p: int
) -> Float64Array:
    """Choose p combinations of a tower's features that keep most of what over_arch reads.

    over_arch's first layer reads sum_fg W_hfg <e_f, e_g>. For one tower, W unfolds into a
    matrix (its features) x (everything else); its leading left singular vectors (with features
    scaled by their norms) are the combinations sum_f a_mf e_f that lose least.

    Args:
        pair_weights: W, symmetric in its last two axes, shape (H, V, V).
        norms: Root mean square norm of every vector, shape (V,).
        members: Indices of the tower's features among the V vectors.
        p: How many combinations.

    Returns:
        a, shape (p, V), zero outside the tower; rows beyond the tower's rank are zero.
    """
    scaled = pair_weights[:, members, :] * norms[members, None] * norms
    unfolded = scaled.transpose(1, 0, 2).reshape(len(members), -1)
    left, _, _ = np.linalg.svd(unfolded @ unfolded.T)
    combos = np.zeros((p, pair_weights.shape[1]))
    take = min(p, len(members))
    safe = np.where(norms[members] > 0, norms[members], 1.0)
    combos[:take, members] = left[:, :take].T / safe * np.mean(safe)
    return combos
