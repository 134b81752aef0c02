"""Allot output dims to towers by where the model needs them, at the same bytes in all.

Every tower starts with all its dims; one dim at a time is then taken from the tower that loses
least by it, per element saved, until what is emitted is within the budget.
Letters: T towers, N embedding dim, K_t vectors that tower t emits, D_t its output dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.initialisation.dcn_start import coordinate_losses
from dmt_convert.conversion.initialisation.dot_conversion import pair_importance
from dmt_convert.conversion.initialisation.dot_start import second_moments, shared_projection
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.conversion.initialisation.linear_conversion import first_layers
from dmt_convert.conversion.initialisation.linear_start import output_losses
from dmt_convert.conversion.initialisation.restored_start import allot_restored
from dmt_convert.model import DmtSpec, TowerSpec

Array = npt.NDArray[np.float64]
Loss = Callable[[Sequence[int]], float]
_MAX_ELEMENTS: Final = 1 << 24


def allot_dims(trace: FlatTrace, spec: DmtSpec) -> DmtSpec:
    """Give every tower its own D, emitting no more than `spec` does.

    Of modules that combine features only the linear one: combinations of features compete for the
    same dims in ways that no closed form weighs where the network behind changes as well.

    Args:
        trace: What the flat model computes on sampled rows.
        spec: Towers of one D each, which set the budget.

    Returns:
        The spec with the D that lose least; `spec` itself where one D for all loses no more.
    """
    module = spec.towers[0].module
    if spec.is_passthrough or len(spec.towers) == 1 or module.p:
        return spec
    if spec.kind == "linear":
        return allot_restored(trace, spec)
    loss = _tower_loss(trace, spec)
    dims = [tower.module.dim for tower in spec.towers]
    if loss is None:
        return spec
    costs = [tower.module.num_vectors(len(tower.features)) for tower in spec.towers]
    limits = [
        max(1, -(-max(spec.tower_dims(t)) // max(1, module.c))) for t in range(len(spec.towers))
    ]
    budget = sum(cost * dim for cost, dim in zip(costs, dims, strict=True))
    chosen = _take_dims(loss, costs, limits, budget)
    if chosen is None or not loss(chosen) < loss(dims):
        return spec
    towers = tuple(
        TowerSpec(features=tower.features, module=replace(tower.module, dim=dim))
        for tower, dim in zip(spec.towers, chosen, strict=True)
    )
    return replace(spec, towers=towers)


def _take_dims(
    loss: Loss, costs: Sequence[int], limits: Sequence[int], budget: int
) -> list[int] | None:
    """Take dims from full towers until the budget is met; None where one each is too much."""
    dims = list(limits)
    if sum(costs) > budget:
        return None
    while sum(cost * dim for cost, dim in zip(costs, dims, strict=True)) > budget:
        current = loss(dims)
        options = []
        for t, cost in enumerate(costs):
            if dims[t] > 1:
                fewer = [*dims[:t], dims[t] - 1, *dims[t + 1 :]]
                options.append(((loss(fewer) - current) / cost, t))
        dims[min(options)[1]] -= 1
    _fill(loss, dims, costs, limits, budget)
    return dims


def _fill(
    loss: Loss, dims: list[int], costs: Sequence[int], limits: Sequence[int], budget: int
) -> None:
    """Give back what the last dim taken left of the budget."""
    while True:
        left = budget - sum(cost * dim for cost, dim in zip(costs, dims, strict=True))
        options = []
        for t, cost in enumerate(costs):
            if cost <= left and dims[t] < limits[t]:
                more = [*dims[:t], dims[t] + 1, *dims[t + 1 :]]
                options.append(((loss(more) - loss(dims)) / cost, t))
        if not options:
            return
        dims[min(options)[1]] += 1


def _tower_loss(trace: FlatTrace, spec: DmtSpec) -> Loss | None:
    """What the logit loses by given dims, as far as moments tell; None where it is too much."""
    kind = spec.flat.interaction.kind
    if kind == "dot":
        return _dot_loss(trace, spec)
    curves = _curves(trace, spec)

    def loss(dims: Sequence[int]) -> float:
        kept = zip(curves, dims, strict=True)
        return float(sum(curve[min(len(curve) - 1, dim)] for curve, dim in kept))

    return loss


def _dot_loss(trace: FlatTrace, spec: DmtSpec) -> Loss | None:
    """Weighted square error of all dots where a pair keeps the coordinates that both emit.

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


def _curves(trace: FlatTrace, spec: DmtSpec) -> list[Array]:
    """Per tower, what is lost by D = 0, 1, 2, ..."""
    starts = np.cumsum([0, *spec.flat.feature_dims])
    columns = {
        name: np.arange(starts[i], starts[i + 1]) for i, name in enumerate(spec.flat.feature_names)
    }
    curves = []
    for tower in spec.towers:
        blocks = [columns[name] for name in tower.features]
        if spec.flat.interaction.kind == "dcn":
            own = np.concatenate(blocks)
            losses = coordinate_losses(trace.pooled[:, own], trace.pooled_gradient[:, own])
            step = len(blocks)
        else:
            losses = _feature_losses(trace, spec, blocks)
            step = max(1, tower.module.c)
        curves.append(
            losses[::step]
            if (len(losses) - 1) % step == 0
            else np.append(losses[::step], losses[-1])
        )
    return curves


def _feature_losses(
    trace: FlatTrace, spec: DmtSpec, blocks: Sequence[npt.NDArray[np.intp]]
) -> Array:
    """What is lost where every feature of a tower emits 0, 1, ... elements."""
    dense = spec.flat.input_dims[0]
    layers = [trace.weights[f"{name}.weight"] for name in first_layers(spec)]
    stacked = np.concatenate(layers).astype(np.float64)
    each = [output_losses(stacked[:, dense + own], trace.pooled[:, own]) for own in blocks]
    length = max(len(curve) for curve in each)
    total: Array = np.sum([np.pad(curve, (0, length - len(curve))) for curve in each], axis=0)
    return total
