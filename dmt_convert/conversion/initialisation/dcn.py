"""Closed form for DCNv2: which coordinates a tower emits, and layers refitted on them.

The cross layers multiply coordinate k of the input with coordinate k of a linear map, so a
rotation of the embeddings would break them: a tower emits chosen coordinates as they are, and
the others are rebuilt from those by regression. Coordinates are chosen by the logit's gradient.

Letters: n rows, M width of the flat concatenation (dense first), M_t sum of a tower's embedding
dims, S (k) chosen coordinates, r rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from dmt_convert.arrays import Float32Array, Float64Array, FloatArray
from dmt_convert.conversion.initialisation.closed_form import (
    ClosedForm,
    Indices,
    Loss,
    Start,
    every_step,
    sum_of_curves,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace, tower_moments
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.model import DmtSpec

_BLOCK_ROWS: Final = 512
_EXACT_WIDTH: Final = 1024
_SKETCH_ROWS: Final = 256


class CrossForm(ClosedForm):
    """Chosen coordinates; cross layers and over_arch refitted."""

    def fits(self, spec: DmtSpec) -> bool:
        """Dcn tower modules in front of a cross network."""
        return spec.kind == "dcn" and "cross" in spec.flat.interaction.rules.input_layers

    def start(self, trace: FlatTrace, spec: DmtSpec) -> Start:
        """Choose every tower's coordinates, then refit layer after layer.

        Given the coordinates S, a cross layer's rows W_S and b_S are the flat ones; only V must
        read its r numbers from fewer inputs. It is refitted by ridge regression on the inputs of
        the converted layer, so later layers make up for what earlier ones lost.
        """
        modules, chosen, blocks = _choose(trace, spec)
        dense = np.arange(spec.flat.input_dims[0])
        blocks = [(dense, np.eye(len(dense))), *blocks]
        picked = np.concatenate([dense, *chosen]).astype(np.intp)
        return _refit_layers(trace, spec, picked, blocks, modules)

    def tower_loss(self, trace: FlatTrace, spec: DmtSpec) -> Loss:
        """Sum of the towers' losses by the number of coordinates."""
        curves = []
        for tower, columns in zip(spec.towers, spec.columns_by_tower, strict=True):
            own = list(columns)
            losses = coordinate_losses(trace.pooled[:, own], trace.pooled_gradient[:, own])
            curves.append(every_step(losses, len(tower.features)))
        return sum_of_curves(curves)


def _choose(
    trace: FlatTrace, spec: DmtSpec
) -> tuple[list[dict[str, Float64Array]], list[Indices], list[tuple[Indices, Float64Array]]]:
    """Per tower: the module's state, the chosen coordinates, and how to rebuild all others."""
    dense_width = spec.flat.input_dims[0]
    first_v = trace.weights["cross.0.v"]
    modules, chosen, blocks = [], [], []
    for t, tower in enumerate(spec.towers):
        own = np.array(spec.columns_by_tower[t])
        members = own + dense_width
        covariance, felt = tower_moments(trace.pooled[:, own], trace.pooled_gradient[:, own])
        count = spec.tower_widths[t]
        take = min(count, len(members))
        local = choose_coordinates(covariance, felt, take)
        weight = np.zeros((count, len(members)))
        weight[np.arange(take), local] = 1.0
        rank = min(tower.module.cross_rank, len(members))
        state: dict[str, Float64Array] = {"weight": weight, "bias": np.zeros(count)}
        for layer in range(tower.module.cross_layers):
            # W = 0: the tower's own cross network begins as the identity and learns from V
            state[f"cross.{layer}.w"] = np.zeros((len(members), rank))
            state[f"cross.{layer}.v"] = _leading_rows(first_v[:, members], rank)
            state[f"cross.{layer}.bias"] = np.zeros(len(members))
        modules.append(state)
        # outputs beyond the tower's own width stay zero; they read coordinate 0 with weight 0
        chosen.append(np.concatenate([members[local], np.full(count - take, members[0])]))
        block = np.zeros((len(members), count))
        block[:, :take] = rebuild(covariance, local)
        blocks.append((members, block))
    return modules, chosen, blocks


def _leading_rows(matrix: Float32Array, rank: int) -> Float64Array:
    """Return `rank` rows that span the leading part of a matrix's row space."""
    values = matrix.astype(np.float64)
    if len(values) == rank:
        return values
    _, scale, right = np.linalg.svd(values, full_matrices=False)
    rows = np.zeros((rank, matrix.shape[1]))
    take = min(rank, len(scale))
    rows[:take] = scale[:take, None] * right[:take]
    return rows


def _refit_layers(
    trace: FlatTrace,
    spec: DmtSpec,
    picked: Indices,
    blocks: list[tuple[Indices, Float64Array]],
    modules: list[dict[str, Float64Array]],
) -> Start:
    dense_width = trace.dense.shape[1]
    x0 = np.concatenate([trace.dense, trace.pooled[:, picked[dense_width:] - dense_width]], axis=1)
    x0[:, ~np.concatenate([block.any(axis=0) for _, block in blocks])] = 0.0
    x = x0
    dense: dict[str, FloatArray] = {}
    notes = []
    for layer, target in enumerate(_flat_reads(trace, spec.interaction.cross_layers)):
        w, v, bias = (trace.weights[f"cross.{layer}.{kind}"] for kind in ("w", "v", "bias"))
        fit = refit_linear(x, target, _carry(v, blocks))
        chosen_w, chosen_v = w[picked], fit.weight.astype(np.float32)
        shifted = (bias[picked] + chosen_w @ fit.bias).astype(np.float32)
        dense[f"cross.{layer}.w"] = chosen_w
        dense[f"cross.{layer}.v"] = chosen_v
        dense[f"cross.{layer}.bias"] = shifted
        notes.append(f"cross.{layer}.v refitted: R^2 {fit.prior_r2:.6f} -> {fit.r2:.6f}")
        x = np.concatenate(
            [x0[i] * ((x[i] @ chosen_v.T) @ chosen_w.T + shifted) + x[i] for i in _blocks(len(x))]
        )
    first = _carry(trace.weights["over_arch.0.weight"], blocks)
    fit = refit_linear(x, trace.pre_activation, first)
    dense["over_arch.0.weight"], dense["over_arch.0.bias"] = fit.weight, fit.bias
    notes.append(f"over_arch.0 refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}")
    return Start(modules=modules, dense=dense, notes=tuple(notes))


def _carry(weight: Float32Array, blocks: list[tuple[Indices, Float64Array]]) -> Float64Array:
    """Return weights on the chosen coordinates that equal the flat weights on rebuilt ones."""
    return np.concatenate([weight[:, rows] @ block for rows, block in blocks], axis=1)


def _flat_reads(trace: FlatTrace, layers: int) -> list[Float32Array]:
    """What every flat cross layer reads of its input: V x, shape (n, r) per layer.

    A block of rows at a time: only V x is kept, not the layers' inputs.
    """
    reads: list[list[Float32Array]] = [[] for _ in range(layers)]
    for rows in _blocks(len(trace.dense)):
        x0 = np.concatenate([trace.dense[rows], trace.pooled[rows]], axis=1)
        x = x0
        for layer in range(layers):
            w, v, bias = (trace.weights[f"cross.{layer}.{kind}"] for kind in ("w", "v", "bias"))
            reads[layer].append(x @ v.T)
            x = x0 * (reads[layer][-1] @ w.T + bias) + x
    return [np.concatenate(parts) for parts in reads]


def _blocks(count: int) -> list[slice]:
    return [slice(a, a + _BLOCK_ROWS) for a in range(0, count, _BLOCK_ROWS)]


def choose_coordinates(covariance: Float64Array, sensitivity: Float64Array, count: int) -> Indices:
    """Choose coordinates greedily so that the logit loses least when the rest is regressed.

    The loss of a choice S is tr(G R_S), where R_S is the covariance left after regression on
    the coordinates in S, and G = E[g g^T] the second moment of the logit's gradient. Each step
    takes the coordinate with the largest reduction |G^(1/2) R_k|^2 / R_kk (column subset
    selection by pivoted elimination).

    Args:
        covariance: Of the tower's embeddings, shape (M_t, M_t).
        sensitivity: G, shape (M_t, M_t).
        count: k.

    Returns:
        Sorted indices, shape (k,); once nothing is left to explain, the first free ones.
    """
    chosen, _ = _choose_greedily(covariance, sensitivity, count)
    free = np.ones(len(covariance), dtype=bool)
    free[chosen] = False
    rest = [int(i) for i in np.flatnonzero(free)[: count - len(chosen)]]
    return np.sort(np.array(chosen + rest, dtype=np.intp))


def coordinate_losses(vectors: Float32Array, gradient: Float32Array) -> Float64Array:
    """What the logit loses by 0, 1, ..., M_t coordinates, chosen as above.

    Args:
        vectors: The tower's embeddings on sampled rows, shape (n, M_t).
        gradient: Gradient of the logit by them, shape (n, M_t).

    Returns:
        tr(G R_S) for every number of coordinates, shape (M_t + 1,).
    """
    covariance, sensitivity = tower_moments(vectors, gradient)
    _, gains = _choose_greedily(covariance, sensitivity, len(covariance))
    total = float(np.sum(sensitivity * covariance))
    losses = np.zeros(len(covariance) + 1)
    losses[: len(gains) + 1] = np.maximum(total - np.cumsum([0.0, *gains]), 0.0)
    return losses


def _choose_greedily(
    covariance: Float64Array, sensitivity: Float64Array, count: int
) -> tuple[list[int], list[float]]:
    """Coordinates in the order of choice, and by how much each lowers the loss."""
    root = _square_root(sensitivity) @ covariance
    diagonal = np.diag(covariance).astype(np.float64)
    factors = np.empty((count, len(covariance)))  # covariance - factors^T factors is what is left
    floor = 1e-10 * max(float(diagonal.max(initial=0.0)), 1e-30)
    chosen: list[int] = []
    gains: list[float] = []
    free = np.ones(len(covariance), dtype=bool)
    for step in range(count):
        usable = free & (diagonal > floor)
        if not usable.any():
            break
        gain = np.where(usable, np.square(root).sum(axis=0), -1.0)
        gain = np.where(usable, gain / np.where(usable, diagonal, 1.0), -1.0)
        k = int(np.argmax(gain))
        chosen.append(k)
        gains.append(float(gain[k]))
        free[k] = False
        scale = float(np.sqrt(diagonal[k]))
        factors[step] = (covariance[k] - factors[:step, k] @ factors[:step]) / scale
        root -= np.outer(root[:, k] / scale, factors[step])
        diagonal = diagonal - np.square(factors[step])
    return chosen, gains


def _square_root(sensitivity: Float64Array) -> Float64Array:
    """Return A with A^T A = G, shape (rank, M_t); for wide towers A^T A only estimates G.

    Beyond 1,024 coordinates the eigenvectors take longer than all else; 256 random combinations
    of the rows of a Cholesky factor keep every gain to within some per cent.
    """
    width = len(sensitivity)
    if width <= _EXACT_WIDTH:
        values, axes = np.linalg.eigh(sensitivity)
        keep = values > max(float(values.max(initial=0.0)), 0.0) * 1e-6
        exact: Float64Array = (axes[:, keep] * np.sqrt(values[keep])).T
        return exact
    damping = 1e-9 * max(float(np.trace(sensitivity)) / width, 1e-30)
    factor = np.linalg.cholesky(sensitivity + damping * np.eye(width))
    mix = np.random.default_rng(0).standard_normal((_SKETCH_ROWS, width))
    sketch: Float64Array = mix @ factor.T / np.sqrt(_SKETCH_ROWS)
    return sketch


def rebuild(covariance: Float64Array, chosen: Indices) -> Float64Array:
    """Regress all coordinates on the chosen ones.

    Returns:
        B with x - mean ~ B (x_chosen - mean), shape (M_t, k); chosen rows are unit vectors.
    """
    inner = covariance[np.ix_(chosen, chosen)]
    ridge = 1e-6 * max(float(np.trace(inner)) / max(1, len(chosen)), 1e-30)
    solution = np.linalg.solve(inner + ridge * np.eye(len(chosen)), covariance[chosen])
    back: Float64Array = np.array(solution.T, dtype=np.float64)
    back[chosen] = np.eye(len(chosen))
    return back
