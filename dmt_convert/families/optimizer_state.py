"""Find the optimizer's accumulators of squared gradients: they tell what training saw.

Adagrad's `sum`, row-wise Adagrad's `momentum` or `momentum1` (one number per row of a table) and
Adam's `exp_avg_sq`. TorchRec's fused Adam calls its average of plain gradients `momentum1` too;
it is told by the `exp_avg_sq`, formerly `momentum2`, beside it. A table's rows gather squared
gradients in proportion to how often they are looked up; a layer's columns in proportion to the
squares of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.families.matching import Match
from dmt_convert.families.name_map import strip_wrappers

Array = npt.NDArray[np.float64]
_ADAM: Final = ("exp_avg_sq", "momentum2")
_ADAGRAD: Final = ("sum", "momentum1", "momentum")
_ROUNDING: Final = {"fp64": 1e-6, "fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}
"""Dtypes of accumulators, and how far off a number may be in them (fp64 is read as fp32)."""


def find_optimizer_state(checkpoint: FlatCheckpoint, match: Match) -> Mapping[str, TensorInfo]:
    """Return canonical name -> accumulator; tensors without one are left out.

    Handles states keyed by parameter name (DCP, fused optimizers) and by parameter index
    (a plain `optimizer.state_dict()`, whose order is that of the model's tensors).
    """
    canonical = {info.name: name for name, info in match.tensors.items()}
    by_name = {
        strip_wrappers(name).removeprefix(match.prefix): target
        for name, target in canonical.items()
    }
    shapes = {info.name: info.shape for info in match.tensors.values()}
    states = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.container != match.container
        and _last_key(tensor) in (*_ADAM, *_ADAGRAD)
        and tensor.dtype in _ROUNDING
    ]
    indexed = _by_index(states, match, shapes) if checkpoint.ordered else {}
    options: dict[str, list[TensorInfo]] = {}
    for tensor in states:
        name = indexed.get(tensor.container)
        target = canonical.get(name) if name is not None else _parameter_named(tensor, by_name)
        if target is not None:
            options.setdefault(target, []).append(tensor)
    found: dict[str, TensorInfo] = {}
    for target, tensors in options.items():
        shape = match.tensors[target].shape
        rows = ((*shape[:1], 1), shape[:1]) if target.startswith("tables.") else ()
        adam = [tensor for tensor in tensors if _last_key(tensor) in _ADAM]
        for tensor in adam or tensors:
            if tensor.shape in (shape, *rows):
                found.setdefault(target, tensor)
    return found


def is_accumulator(state: TensorInfo) -> bool:
    """Tell Adagrad's sum of squared gradients, which only grows, from Adam's decayed mean."""
    return _last_key(state) in _ADAGRAD


def read_initial_value(checkpoint: FlatCheckpoint, state: TensorInfo) -> float:
    """Return what an accumulator held before training: Adagrad may start above zero.

    torch's optimizers keep it in `param_groups`, beside `state`. 0 where nothing is said, or
    several groups say different things.
    """
    if "state" not in state.container or _last_key(state) in _ADAM:
        return 0.0
    above = state.container[: state.container.index("state")]
    start = ".".join((*above, "param_groups", ""))
    values = {
        value
        for key, value in checkpoint.scalars.items()
        if key.startswith(start) and key.endswith(".initial_accumulator_value")
    }
    value = values.pop() if len(values) == 1 else 0.0
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else 0.0


def subtract_initial(values: Array, dtype: str, initial: float) -> Array:
    """Return what was gathered since the accumulator held `initial`, rounded to its dtype."""
    if not initial:
        return values
    untouched = values <= initial * (1 + _ROUNDING[dtype])
    return np.where(untouched, 0.0, values - initial)


def _last_key(tensor: TensorInfo) -> str:
    return tensor.name.rsplit(".", maxsplit=1)[-1]


def _by_index(
    states: list[TensorInfo], match: Match, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, ...], str]:
    """Return container of a state -> parameter, for states keyed by parameter index.

    An optimizer of some parameters, or with groups in another order, numbers them otherwise;
    where one shape contradicts, none of its indices is trusted.
    """
    names: dict[tuple[str, ...], str] = {}
    distrusted: set[tuple[str, ...]] = set()
    for tensor in states:
        container = tensor.container
        if len(container) < 2 or container[-2] != "state" or not container[-1].isdecimal():
            continue
        index = int(container[-1][:7])
        name = match.parameter_names[index] if index < len(match.parameter_names) else ""
        shape = shapes.get(name, ())
        names[container] = name
        if tensor.shape not in (shape, shape[:1], (*shape[:1], 1)):
            distrusted.add(container[:-2])
    return {key: name for key, name in names.items() if key[:-2] not in distrusted}


def _parameter_named(tensor: TensorInfo, by_name: Mapping[str, str]) -> str | None:
    """Find a parameter's name within the path of a state."""
    parts = strip_wrappers(tensor.path).split(".")
    for end in range(len(parts) - 1, 0, -1):
        for start in range(end):
            target = by_name.get(".".join(parts[start:end]))
            if target is not None:
                return target
    return None
