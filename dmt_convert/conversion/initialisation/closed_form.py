"""What a closed form is: how the weights of a converted model follow from the flat one's.

It also allots output dims: every tower starts with all its dims; one dim at a time is then taken
from the tower that loses least by it, per element saved, until the model emits no more than its
budget.

Letters: T towers, N embedding dim, K_t vectors that tower t emits, D_t its output dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dmt_convert.arrays import Float64Array, FloatArray
from dmt_convert.conversion.initialisation.flat_trace import FlatTrace
from dmt_convert.model import ELEMENT_BYTES, DmtModel, DmtSpec

Indices = npt.NDArray[np.intp]
"""Columns of a matrix."""
Loss = Callable[[Sequence[int]], float]
"""Estimates what the logit loses by given output dims, one per tower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Weights that differ from the flat model's."""

    modules: Sequence[Mapping[str, FloatArray]]
    """State of every tower's module, by name."""
    dense: Mapping[str, FloatArray] = field(default_factory=dict)
    """Changed or new weights outside towers, by canonical name."""
    notes: tuple[str, ...] = ()
    """What was done, one line each."""


class ClosedForm(ABC):
    """The closed form of some converted models; a new one is an entry in `CLOSED_FORMS`."""

    @abstractmethod
    def fits(self, spec: DmtSpec) -> bool:
        """Whether it is for this model."""

    @abstractmethod
    def start(self, trace: FlatTrace, spec: DmtSpec) -> Start:
        """Solve the weights.

        Args:
            trace: Intermediate results of the flat model on sampled rows.
            spec: The converted model.
        """

    def finish(self, model: DmtModel, trace: FlatTrace, start: Start) -> tuple[str, ...]:
        """Fit what depends on the converted model's own outputs; one line per fit.

        Args:
            model: The model with the weights of `start`, changed in place.
            trace: Intermediate results of the flat model on sampled rows.
            start: What `start` returned.
        """
        return ()

    def tower_loss(self, trace: FlatTrace, spec: DmtSpec) -> Loss | None:
        """Return what the logit loses by given dims, as far as moments tell; None: unknown."""
        return None

    def allot(self, trace: FlatTrace, spec: DmtSpec, budget: int, *, mix: bool = True) -> DmtSpec:
        """Give every tower its own D.

        Args:
            trace: Intermediate results of the flat model on sampled rows.
            spec: Towers of one D each.
            budget: Bytes that all towers may send per sample.
            mix: Whether elements of an int8 code may take 4 bits.

        Returns:
            The spec with the D that lose least; `spec` itself if one D for all loses no more.
        """
        loss = self.tower_loss(trace, spec)
        if loss is None:
            return spec
        dims = [tower.module.dim for tower in spec.towers]
        costs = [tower.module.num_vectors(len(tower.features)) for tower in spec.towers]
        limits = [
            max(1, -(-max(own) // max(1, tower.module.c)))
            for tower, own in zip(spec.towers, spec.dims_by_tower, strict=True)
        ]
        chosen = _take_dims(loss, costs, limits, budget // element_bytes(spec))
        return spec if chosen is None or not loss(chosen) < loss(dims) else with_dims(spec, chosen)


def element_bytes(spec: DmtSpec) -> int:
    """Bytes of an element that towers send, unless it takes 4 bits."""
    code = spec.sending_towers[0].module.code
    return ELEMENT_BYTES["fp32" if code is None else code.precision]


def with_dims(spec: DmtSpec, dims: Sequence[int]) -> DmtSpec:
    """Return a model with other output dims D_t; towers on every rank keep theirs."""
    return replace(
        spec,
        towers=tuple(
            tower if tower.everywhere else replace(tower, module=replace(tower.module, dim=dim))
            for tower, dim in zip(spec.towers, dims, strict=True)
        ),
    )


def every_step(losses: Float64Array, step: int) -> Float64Array:
    """Return the loss of 0, step, 2 step, ... elements; the last entry is that of all elements."""
    is_whole = (len(losses) - 1) % step == 0
    return losses[::step] if is_whole else np.append(losses[::step], losses[-1])


def sum_of_curves(curves: Sequence[Float64Array]) -> Loss:
    """Return the loss of a model whose towers lose independently; a curve is indexed by D_t."""

    def loss(dims: Sequence[int]) -> float:
        kept = zip(curves, dims, strict=True)
        return float(sum(curve[min(len(curve) - 1, dim)] for curve, dim in kept))

    return loss


def _take_dims(
    loss: Loss, costs: Sequence[int], limits: Sequence[int], budget: int
) -> list[int] | None:
    """Take dims from full towers until the budget is met; None if one each is too much."""
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
    """Spend the rest of the budget after the last dim was taken."""
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
