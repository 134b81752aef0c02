"""Closed form for models that pair vectors: projections that keep the dot products.

Letters: n rows, V vectors paired in the flat model (dense first), K those of the converted one,
N embedding dim, D output dim, T towers, H over_arch's first outputs; c and p as in DESIGN
section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import nn

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.conversion.initialisation import ridge
from dmt_convert.conversion.initialisation.closed_form import ClosedForm, Indices, Loss, Start
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.ridge import ComputedRows, refit_linear
from dmt_convert.interactions import PairRow, pair_rows
from dmt_convert.model import DmtModel, DmtSpec, to_tensor
from dmt_convert.spec import ModelSpec

_FLOOR: Final = 1e-3
_ITERATIONS: Final = 30
_BLOCK_VECTORS: Final = 512
"""Rows of a matrix of all pairs of vectors that are computed at a time."""
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
        layer = model.over_arch[0]
        assert isinstance(layer, nn.Linear)
        if layer.in_features > ridge.MAX_INPUTS:
            return (_fit_bias(model, layer, trace),)

        def interact(rows: slice) -> Float32Array:
            emitted = model.emit(to_tensor(trace.pooled[rows]))
            interacted: Float32Array = model.interact(to_tensor(trace.dense[rows]), emitted).numpy()
            return interacted

        inputs = ComputedRows((len(trace.dense), layer.in_features), interact).kept_if_small()
        prior = np.asarray(start.dense["over_arch.0.weight"], dtype=np.float64)
        fit = refit_linear(inputs, trace.pre_activation, prior)
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
    moments = second_moments(trace.vectors())
    position = {name: i + 1 for i, name in enumerate(flat.feature_names)}
    widths = [spec.dense_dim] * len(moments)
    for tower in spec.towers:
        for name in tower.features:
            widths[position[name]] = tower.module.dim
    limit = flat.input_dims[0]
    fitted = fit_projections(
        moments, pair_importance(trace), [min(slots * k, limit) for k in widths]
    )
    projections = np.zeros((*fitted.shape[:2], slots * spec.dense_dim))
    projections[:, :, : fitted.shape[2]] = fitted
    combos = _combine_features(trace, spec, moments, position)
    modules = []
    for t, tower in enumerate(spec.towers):
        module = tower.module
        members = np.array([position[name] for name in tower.features])
        emit = projections[members][:, :, _slot_columns(slots, module.dim)]
        state: dict[str, Float64Array] = {}
        if module.c:
            state["feature_weight"] = emit.reshape(-1, emit.shape[2])
            state["feature_bias"] = np.zeros((len(members), emit.shape[2]))
        if module.p:
            combo = combos[t]
            leading = projections[members][:, :, : module.dim].transpose(0, 2, 1)
            state["tower_weight"] = np.concatenate(
                [combo[:, m, None, None] * part for m, part in zip(members, leading, strict=True)],
                axis=2,
            ).reshape(module.p * module.dim, -1)
            state["tower_bias"] = np.zeros(module.p * module.dim)
        modules.append(state)
    carried = _carry_columns(trace, spec, position, combos)
    dense: dict[str, FloatArray] = {"over_arch.0.weight": carried}
    if spec.dense_dim != flat.input_dims[0]:
        columns = _slot_columns(slots, spec.dense_dim)[: spec.dense_dim]
        dense["dense_projection.weight"] = projections[0][:, columns].T
        dense["dense_projection.bias"] = np.zeros(spec.dense_dim)
    return Start(modules=modules, dense=dense)


def _combine_features(
    trace: FlatTrace, spec: DmtSpec, moments: Float64Array, position: dict[str, int]
) -> list[Float64Array]:
    """Return the combinations of every tower, each of shape (p, V); none if p is 0."""
    if not spec.towers[0].module.p:
        return []
    norms = np.sqrt(np.trace(moments, axis1=1, axis2=2))
    members = [np.array([position[name] for name in tower.features]) for tower in spec.towers]
    grams = [np.zeros((len(own), len(own))) for own in members]
    for pairs in _pair_matrices(trace):
        for own, gram in zip(members, grams, strict=True):
            scaled = pairs[own] * norms[own, None] * norms
            gram += scaled @ scaled.T
    return [
        fit_combinations(gram, norms, own, tower.module.p)
        for gram, own, tower in zip(grams, members, spec.towers, strict=True)
    ]


def _slot_columns(slots: int, dim: int) -> Indices:
    """Coordinates that a feature's vectors emit, one vector (slot) after the other.

    Coordinate k lies in slot k mod c, so that towers of different D agree on all that both emit.
    """
    return np.arange(slots * dim).reshape(dim, slots).T.reshape(-1)


def _fit_bias(model: DmtModel, layer: nn.Linear, trace: FlatTrace) -> str:
    """Keep the weights of a layer that is too wide to refit; return what the best bias gives."""
    found = np.concatenate(
        [
            model.pre_activations(
                to_tensor(trace.dense[rows]), model.emit(to_tensor(trace.pooled[rows]))
            ).numpy()
            for rows in row_blocks(trace.spec, len(trace.dense))
        ]
    )
    lost = trace.pre_activation.astype(np.float64) - found
    shift = lost.mean(axis=0)
    layer.bias.add_(torch.from_numpy(shift.astype(np.float32)))
    spread = np.square(trace.pre_activation - trace.pre_activation.mean(axis=0)).sum()
    r2 = 1 - float(np.square(lost - shift).sum()) / (float(spread) or 1.0)
    return f"over_arch.0 is too wide to be refitted: R^2 of pre-activations {r2:.6f}"


def _pair_matrices(trace: FlatTrace) -> Iterator[Float64Array]:
    """Yield over_arch's first layer as W[h, i, j], symmetric in i and j, one h at a time: (V, V).

    The same array every time.
    """
    flat = trace.spec
    count, begin = len(flat.input_dims), flat.input_dims[0]
    rows = _rows_of_pairs(count, flat)
    matrix = np.zeros((count, count))
    for weight in trace.weights["over_arch.0.weight"]:
        for row in rows:
            values = weight[begin:][row.columns]
            matrix[row.vector, row.others] = matrix[row.others, row.vector] = values
        yield matrix


def _rows_of_pairs(count: int, flat: ModelSpec) -> list[PairRow]:
    """Return the pairs of `count` vectors, as a model's interaction orders them."""
    spec = flat.interaction
    return list(pair_rows(count, spec.pair_order, self_pairs=spec.self_pairs))


def pair_importance(trace: FlatTrace) -> Float64Array:
    """How much the logit feels an error in each pair: its mean square gradient, shape (V, V).

    The gradient by pair k is g.W[:, k], with g that by the first layer's outputs, so its mean
    square is W[:, k]^T E[g g^T] W[:, k].
    """
    flat = trace.spec
    count, begin = len(flat.input_dims), flat.input_dims[0]
    felt = trace.pre_gradient.astype(np.float64)
    felt = felt.T @ felt / max(1, len(felt))
    weight = trace.weights["over_arch.0.weight"]
    importance = np.zeros((count, count))
    total, pairs = 0.0, max(1, weight.shape[1] - begin)
    for row in _rows_of_pairs(count, flat):
        columns = weight[:, begin:][:, row.columns].astype(np.float64)
        squares = np.maximum(np.einsum("hp,hp->p", felt @ columns, columns), 0.0)
        importance[row.vector, row.others] = importance[row.others, row.vector] = squares
        total += float(squares.sum())
    floor = _FLOOR * total / pairs
    importance += floor if floor > 0 else 1.0
    np.fill_diagonal(importance, 0.0)
    return importance


def _carry_columns(
    trace: FlatTrace, spec: DmtSpec, position: dict[str, int], combos: list[Float64Array]
) -> FloatArray:
    """Return weights of the converted pairs, which mean the same as the flat ones."""
    module = spec.towers[0].module
    flat = trace.weights["over_arch.0.weight"]
    begin = spec.flat.input_dims[0]
    origin, slot = [0], [0]
    for tower in spec.towers:
        for name in tower.features if module.c else ():
            origin += [position[name]] * module.c
            slot += list(range(module.c))
        origin += [-1] * module.p
        slot += [-1] * module.p
    rows = _rows_of_pairs(len(origin), spec.flat)
    carried = np.zeros((len(flat), begin + rows[-1].columns.stop), dtype=np.float32)
    carried[:, :begin] = flat[:, :begin]
    if not module.c:
        for h, combined in enumerate(_combined_pairs(trace, combos)):
            np.fill_diagonal(combined, combined.diagonal() / 2)
            for row in rows:
                carried[h, begin:][row.columns] = combined[row.vector, row.others]
        return carried
    source, kind = np.array(origin), np.array(slot)
    for row in rows:
        left, right = source[row.vector], source[row.others]
        same = (kind[row.others] == kind[row.vector]) & (kind[row.vector] >= 0)
        distinct = right != left
        if spec.flat.interaction.self_pairs:
            distinct |= np.arange(len(source))[row.others] == row.vector
        kept = np.flatnonzero(same & distinct)
        columns = _pair_columns(left, right[kept], spec.flat)
        carried[:, begin + row.columns.start + kept] = flat[:, begin + columns]
    return carried


def _pair_columns(left: int, right: Indices, flat: ModelSpec) -> Indices:
    """Return where the pairs of one vector and others stand among the flat model's pairs."""
    count, spec = len(flat.input_dims), flat.interaction
    small, large = np.minimum(left, right), np.maximum(left, right)
    own = int(spec.self_pairs)
    if spec.pair_order == "tril":
        columns: Indices = large * (large - 1 + 2 * own) // 2 + small
    else:
        columns = small * (2 * count - small - 1 + 2 * own) // 2 + large - small - 1 + own
    return columns


def _combined_pairs(trace: FlatTrace, combos: list[Float64Array]) -> Iterator[Float64Array]:
    """Rewrite W for vectors that are combinations: A^T W A with A the pseudo-inverse, (K, K) per h.

    Twice the quadratic form: W holds a pair of different vectors twice, so a self-pair counts
    double as well; the caller halves the diagonal.
    """
    dense = np.zeros((1, combos[0].shape[1]))
    dense[0, 0] = 1.0
    # combinations of different towers have no feature in common: each is inverted by itself
    back = np.concatenate([np.linalg.pinv(part) for part in (dense, *combos)], axis=1)
    for pairs in _pair_matrices(trace):
        doubled = pairs + np.diag(pairs.diagonal())
        yield np.asarray(back.T @ doubled @ back)


def _dot_loss(trace: FlatTrace, spec: DmtSpec) -> Loss | None:
    """Weighted square error of all dots; a pair keeps the coordinates that both emit.

    In the basis of the shared projection, dropping the coordinates from d on costs pair (i, j)
    w_ij sum_(k, l >= d) C_i[k, l] C_j[k, l]; summed over the pairs of two towers that is a table
    over d, shape (N + 1, T + 1, T + 1), the dense vector being a tower of its own.
    """
    count, dim = len(spec.flat.input_dims), spec.flat.input_dims[0]
    if count * dim * dim > _MAX_ELEMENTS:
        return None
    moments = second_moments(trace.vectors())
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


def second_moments(vectors: Iterable[Float32Array]) -> Float64Array:
    """Second moments of every vector, shape (V, N, N), from samples of shape (n, N) each."""
    moments = []
    for samples in vectors:
        x = samples.astype(np.float64)
        moments.append(x.T @ x / max(1, len(x)))
    return np.stack(moments)


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
    count = len(moments)
    total = 0.0
    # tr(C_i P_i P_j^T C_j): <P_i-weighted moments> contracted pairwise
    for factors, sign in ((moments, 1), (cp, -2), (pcp, 1)):
        flat = factors.reshape(count, -1)
        for begin in range(0, count, _BLOCK_VECTORS):
            rows = slice(begin, begin + _BLOCK_VECTORS)
            total += sign * float(np.vdot(importance[rows], flat[rows] @ flat.T))
    return total


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
    gram: Float64Array, norms: Float64Array, members: Indices, p: int
) -> Float64Array:
    """Choose p combinations of a tower's features that keep most of what over_arch reads.

    over_arch's first layer reads sum_fg W_hfg <e_f, e_g>. For one tower, W unfolds into a
    matrix U, (its features) x (everything else); its leading left singular vectors (with features
    scaled by their norms) are the combinations sum_f a_mf e_f that lose least.

    Args:
        gram: U U^T, features scaled, shape (F_t, F_t).
        norms: Root mean square norm of every vector, shape (V,).
        members: Indices of the tower's features among the V vectors.
        p: How many combinations.

    Returns:
        a, shape (p, V), zero outside the tower; rows beyond the tower's rank are zero.
    """
    left, _, _ = np.linalg.svd(gram)
    combos = np.zeros((p, len(norms)))
    take = min(p, len(members))
    safe = np.where(norms[members] > 0, norms[members], 1.0)
    combos[:take, members] = left[:, :take].T / safe * np.mean(safe)
    return combos
