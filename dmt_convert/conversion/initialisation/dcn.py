"""Closed form for DCNv2: which coordinates a tower emits, and layers refitted on them.

The cross layers multiply coordinate k of the input with coordinate k of a linear map, so a
rotation of the embeddings would break them: a tower emits chosen coordinates as they are, and
the others are rebuilt from those by regression. Coordinates are chosen by the logit's gradient.

Letters: n rows, M width of the flat concatenation (dense first), M_t sum of a tower's embedding
dims, S (k) chosen coordinates, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from dmt_convert.arrays import BoolArray, Float32Array, Float64Array, FloatArray
from dmt_convert.conversion.initialisation.closed_form import (
    ClosedForm,
    Indices,
    Loss,
    Start,
    every_step,
    sum_of_curves,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.moments import Moment, second_moment
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.model import DmtSpec

_BLOCK_ROWS: Final = 512
_BLOCK_ELEMENTS: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What a tower emits, and what is left of the layers behind it."""

    module: dict[str, FloatArray]
    """State of the tower's module."""
    columns: Indices
    """Chosen columns of the flat concatenation, one for each output of the tower."""
    live: BoolArray
    """Which outputs carry one; all others stay zero."""
    carried: dict[str, Float64Array]
    """Weights of cross.l.v and over_arch.0 on the chosen columns, by canonical name, that equal the
    flat ones on all of the tower's columns as far as these follow from the chosen ones."""


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
        return _refit_layers(
            trace, spec, [_choose(trace, spec, t) for t in range(len(spec.towers))]
        )

    def tower_loss(self, trace: FlatTrace, spec: DmtSpec) -> Loss:
        """Sum of the towers' losses by the number of coordinates."""
        curves = []
        for tower, columns in zip(spec.towers, spec.columns_by_tower, strict=True):
            own = list(columns)
            losses = coordinate_losses(trace.pooled[:, own], trace.pooled_gradient[:, own])
            curves.append(every_step(losses, len(tower.features)))
        return sum_of_curves(curves)


def _choose(trace: FlatTrace, spec: DmtSpec, index: int) -> _Choice:
    """Choose the coordinates of one tower."""
    tower, own = spec.towers[index], np.array(spec.columns_by_tower[index])
    members = own + spec.flat.input_dims[0]
    covariance = second_moment(trace.pooled[:, own], centred=True)
    felt = second_moment(trace.pooled_gradient[:, own], centred=False)
    count = spec.tower_widths[index]
    take = min(count, len(members))
    local = choose_coordinates(covariance, felt, take)
    weight = np.zeros((count, len(members)), dtype=np.float32)
    weight[np.arange(take), local] = 1.0
    rank = min(tower.module.cross_rank, len(members))
    state: dict[str, FloatArray] = {"weight": weight, "bias": np.zeros(count)}
    for layer in range(tower.module.cross_layers):
        # W = 0: the tower's own cross network begins as the identity and learns from V
        state[f"cross.{layer}.w"] = np.zeros((len(members), rank))
        state[f"cross.{layer}.v"] = _leading_rows(trace.weights["cross.0.v"][:, members], rank)
        state[f"cross.{layer}.bias"] = np.zeros(len(members))
    carried = {}
    for name in _read_layers(spec):
        flat = trace.weights[name][:, members]
        carried[name] = np.zeros((len(flat), count))
        carried[name][:, :take] = covariance.regressed(flat, local)
    return _Choice(
        module=state,
        # outputs beyond the tower's own width stay zero; they read coordinate 0 with weight 0
        columns=np.concatenate([members[local], np.full(count - take, members[0])]),
        live=np.arange(count) < take,
        carried=carried,
    )


def _read_layers(spec: DmtSpec) -> list[str]:
    """Names of the weights that read all inputs."""
    layers = range(spec.interaction.cross_layers)
    return [*(f"cross.{layer}.v" for layer in layers), "over_arch.0.weight"]


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


def _refit_layers(trace: FlatTrace, spec: DmtSpec, choices: list[_Choice]) -> Start:
    dense_width = trace.dense.shape[1]
    chosen = np.concatenate([choice.columns for choice in choices]).astype(np.intp)
    picked = np.concatenate([np.arange(dense_width), chosen])
    x0 = np.empty((len(trace.dense), len(picked)), dtype=np.float32)
    x0[:, :dense_width] = trace.dense
    np.take(trace.pooled, chosen - dense_width, axis=1, out=x0[:, dense_width:], mode="clip")
    x0[:, dense_width:][:, ~np.concatenate([choice.live for choice in choices])] = 0.0
    x = x0.copy()

    def carry(name: str) -> Float64Array:
        own = trace.weights[name][:, :dense_width].astype(np.float64)
        return np.concatenate([own, *(choice.carried[name] for choice in choices)], axis=1)

    dense: dict[str, FloatArray] = {}
    notes = []
    for layer, target in enumerate(_flat_reads(trace, spec.interaction.cross_layers)):
        w, bias = (trace.weights[f"cross.{layer}.{kind}"] for kind in ("w", "bias"))
        fit = refit_linear(x, target, carry(f"cross.{layer}.v"))
        chosen_w, chosen_v = w[picked], fit.weight.astype(np.float32)
        shifted = (bias[picked] + chosen_w @ fit.bias).astype(np.float32)
        dense[f"cross.{layer}.w"] = chosen_w
        dense[f"cross.{layer}.v"] = chosen_v
        dense[f"cross.{layer}.bias"] = shifted
        notes.append(f"cross.{layer}.v refitted: R^2 {fit.prior_r2:.6f} -> {fit.r2:.6f}")
        for rows in _blocks(*x.shape):
            x[rows] += x0[rows] * ((x[rows] @ chosen_v.T) @ chosen_w.T + shifted)
    fit = refit_linear(x, trace.pre_activation, carry("over_arch.0.weight"))
    dense["over_arch.0.weight"], dense["over_arch.0.bias"] = fit.weight, fit.bias
    notes.append(f"over_arch.0 refitted: R^2 of pre-activations {fit.prior_r2:.6f} -> {fit.r2:.6f}")
    return Start(modules=[choice.module for choice in choices], dense=dense, notes=tuple(notes))


def _flat_reads(trace: FlatTrace, layers: int) -> list[Float32Array]:
    """What every flat cross layer reads of its input: V x, shape (n, r) per layer.

    A block of rows at a time: only V x is kept, not the layers' inputs.
    """
    reads: list[list[Float32Array]] = [[] for _ in range(layers)]
    for rows in _blocks(len(trace.dense), sum(trace.spec.input_dims)):
        x0 = np.concatenate([trace.dense[rows], trace.pooled[rows]], axis=1)
        x = x0
        for layer in range(layers):
            w, v, bias = (trace.weights[f"cross.{layer}.{kind}"] for kind in ("w", "v", "bias"))
            reads[layer].append(x @ v.T)
            x = x0 * (reads[layer][-1] @ w.T + bias) + x
    return [np.concatenate(parts) for parts in reads]


def _blocks(count: int, width: int) -> list[slice]:
    step = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // width))
    return [slice(a, a + step) for a in range(0, count, step)]


def choose_coordinates(covariance: Moment, sensitivity: Moment, count: int) -> Indices:
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
    free = np.ones(len(covariance.diagonal), dtype=bool)
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
    covariance = second_moment(vectors, centred=True)
    sensitivity = second_moment(gradient, centred=False)
    width = vectors.shape[1]
    _, gains = _choose_greedily(covariance, sensitivity, width)
    total = covariance.trace_of_product(sensitivity)
    losses = np.zeros(width + 1)
    losses[: len(gains) + 1] = np.maximum(total - np.cumsum([0.0, *gains]), 0.0)
    return losses


def _choose_greedily(
    covariance: Moment, sensitivity: Moment, count: int
) -> tuple[list[int], list[float]]:
    """Coordinates in the order of choice, and by how much each lowers the loss."""
    root = covariance.mapped(sensitivity.root())
    diagonal = covariance.diagonal
    # covariance - factors^T factors is what is left
    factors = np.empty((min(count, covariance.rank), len(diagonal)))
    floor = 1e-10 * max(float(diagonal.max(initial=0.0)), 1e-30)
    chosen: list[int] = []
    gains: list[float] = []
    free = np.ones(len(diagonal), dtype=bool)
    for step in range(len(factors)):
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
        factors[step] = (covariance.row(k) - factors[:step, k] @ factors[:step]) / scale
        root -= np.outer(root[:, k] / scale, factors[step])
        diagonal = diagonal - np.square(factors[step])
    return chosen, gains
