"""Start of a converted DCNv2: chosen coordinates, cross layers and over_arch refitted.

Letters: n rows, M width of the flat concatenation (dense first), S chosen coordinates, r rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.initialisation.dcn_start import (
    choose_coordinates,
    rebuild,
    tower_moments,
)
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.ridge import refit_linear
from dmt_convert.conversion.initialisation.start import Start
from dmt_convert.model import DmtSpec

Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
_BLOCK_ROWS: Final = 512


def start_dcn(trace: FlatTrace, spec: DmtSpec) -> Start:
    """Choose every tower's coordinates, then refit layer after layer.

    Given the coordinates S, a cross layer's rows W_S and b_S are the flat ones; only V must
    read its r numbers from fewer inputs. It is refitted by ridge regression on what the
    converted layer really sees, so later layers make up for what earlier ones lost.
    """
    modules, chosen, blocks = _choose(trace, spec)
    dense = np.arange(spec.flat.input_dims[0])
    blocks = [(dense, np.eye(len(dense))), *blocks]
    picked = np.concatenate([dense, *chosen]).astype(np.intp)
    return _refit_layers(trace, spec, picked, blocks, modules)


def _choose(
    trace: FlatTrace, spec: DmtSpec
) -> tuple[list[dict[str, Array]], list[Indices], list[tuple[Indices, Array]]]:
    """Per tower: the module's state, the chosen coordinates, and how to rebuild all others."""
    starts = np.cumsum([0, *spec.flat.input_dims])
    columns = {
        name: np.arange(starts[i + 1], starts[i + 2])
        for i, name in enumerate(spec.flat.feature_names)
    }
    dense_width = spec.flat.input_dims[0]
    first_v = trace.weights["cross.0.v"]
    modules, chosen, blocks = [], [], []
    for t, tower in enumerate(spec.towers):
        members = np.concatenate([columns[name] for name in tower.features])
        own = members - dense_width
        covariance, felt = tower_moments(trace.pooled[:, own], trace.pooled_gradient[:, own])
        count = spec.tower_widths[t]
        take = min(count, len(members))
        local = choose_coordinates(covariance, felt, take)
        weight = np.zeros((count, len(members)))
        weight[np.arange(take), local] = 1.0
        rank = min(tower.module.cross_rank, len(members))
        state: dict[str, Array] = {"weight": weight, "bias": np.zeros(count)}
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


def _leading_rows(matrix: FloatArray, rank: int) -> Array:
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
    blocks: list[tuple[Indices, Array]],
    modules: list[dict[str, Array]],
) -> Start:
    dense_width = trace.dense.shape[1]
    x0 = np.concatenate([trace.dense, trace.pooled[:, picked[dense_width:] - dense_width]], axis=1)
    x0[:, ~np.concatenate([block.any(axis=0) for _, block in blocks])] = 0.0
    x = x0
    dense: dict[str, npt.NDArray[np.floating]] = {}
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


def _carry(weight: FloatArray, blocks: list[tuple[Indices, Array]]) -> Array:
    """Weights on the chosen coordinates that read what the flat weights read of the rebuilt."""
    return np.concatenate([weight[:, rows] @ block for rows, block in blocks], axis=1)


def _flat_reads(trace: FlatTrace, layers: int) -> list[FloatArray]:
    """What every flat cross layer reads of its input: V x, shape (n, r) per layer.

    A block of rows at a time: only V x is kept, not the layers' inputs.
    """
    reads: list[list[FloatArray]] = [[] for _ in range(layers)]
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
