"""What is known about a flat model: its spec, its tensors, and how each fact was determined.

An optimizer's accumulators of squared gradients show what the training saw. They are Adagrad's
`sum`, row-wise Adagrad's `momentum` or `momentum1` (one number per row of a table), and Adam's
`exp_avg_sq`. TorchRec's fused Adam also calls its average of plain gradients `momentum1`; the
`exp_avg_sq` (formerly `momentum2`) beside it gives it away. The rows of a table gather squared
gradients in proportion to how often they are looked up, the columns of a layer in proportion to
the squares of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from dmt_convert.arrays import Float64Array
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.documents import InputRecord
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.spec import ModelSpec

Source = Literal["read", "inferred", "assumed", "given"]
_ADAM: Final = ("exp_avg_sq", "momentum2")
_ADAGRAD: Final = ("sum", "momentum1", "momentum")
_ROUNDING: Final = {"fp64": 1e-6, "fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}
"""Dtypes of accumulators, and the relative error of a number stored in them (fp64 is read as
fp32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that is known about the model, and why."""

    subject: str
    """What it is about."""
    value: str
    """What is the case."""
    source: Source
    """read: from the checkpoint; inferred: nothing else fits; assumed: the trainer's documented
    default; given: by the user."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IgnoredTensor:
    """A tensor beside the model's own that was passed over."""

    name: str
    """Its name in the checkpoint, with the keys of the dicts around it."""
    dtype: str
    """Its dtype."""
    shape: tuple[int, ...]
    """Its shape."""
    reason: str
    """Why it was passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlace:
    """Where in a checkpoint a model's tensors are."""

    container: tuple[str, ...]
    """Keys of the dict that holds them."""
    prefix: str
    """What precedes the model's own names (without wrappers such as `module`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatModelInfo:
    """A flat checkpoint whose model is understood."""

    checkpoint: FlatCheckpoint
    """The opened checkpoint."""
    spec: ModelSpec
    """What kind of model it is."""
    tensors: Mapping[str, TensorInfo]
    """Canonical name -> tensor; see `name_map`."""
    optimizer_state: Mapping[str, TensorInfo]
    """Canonical name -> the optimizer's accumulator of squared gradients, if the checkpoint holds
    one: of the tensor's shape, or one number per row of a table."""
    facts: tuple[Fact, ...]
    """How each part of the spec was determined."""
    ignored: tuple[str, ...]
    """What the checkpoint holds in other dicts than the model's, one line each."""
    ignored_tensors: tuple[IgnoredTensor, ...] = ()
    """Tensors of the model's own dict that were passed over."""
    inputs: InputRecord | None = None
    """Which columns of the data are its dense inputs, if that is known."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return (
            f"<FlatModelInfo {self.checkpoint.source}: {self.spec.family}, "
            f"{len(self.spec.features)} features, {len(self.spec.tables)} tables>"
        )

    def table_info(self, table: str) -> TensorInfo:
        """Return the tensor of a table."""
        return self.tensors[f"tables.{table}.weight"]

    @property
    def row_state(self) -> dict[str, TensorInfo]:
        """Table -> its accumulator, of shape (rows, ...); tables without one are left out."""
        return {
            name.removeprefix("tables.").removesuffix(".weight"): info
            for name, info in self.optimizer_state.items()
            if name.startswith("tables.")
        }

    @property
    def accumulators(self) -> dict[str, TensorInfo]:
        """Table -> Adagrad's sum of squared gradients, as in `row_state`.

        Derived tables are left out: their gradients are not those of the tensors in the file.
        """
        return {
            name: info
            for name, info in self.row_state.items()
            if is_accumulator(info) and self.table_info(name).derivation is None
        }

    @property
    def dense_tensors(self) -> dict[str, TensorInfo]:
        """All tensors that are not tables, by canonical name."""
        return {n: info for n, info in self.tensors.items() if not n.startswith("tables.")}


def find_optimizer_state(
    checkpoint: FlatCheckpoint,
    place: ModelPlace,
    tensors: Mapping[str, TensorInfo],
    parameter_names: tuple[str, ...],
) -> dict[str, TensorInfo]:
    """Return canonical name -> accumulator; tensors without one are left out.

    Handles states keyed by parameter name (DCP, fused optimizers) and by parameter index
    (a plain `optimizer.state_dict()`, whose order is that of the model's tensors).

    Args:
        checkpoint: The checkpoint.
        place: Where the model is in it.
        tensors: Canonical name -> tensor, as the file holds it.
        parameter_names: Names of all tensors in the model's dict, in file order.
    """
    canonical = {info.name: name for name, info in tensors.items()}
    by_name = {
        strip_wrappers(name).removeprefix(place.prefix): target
        for name, target in canonical.items()
    }
    states = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.container != place.container
        and _last_key(tensor) in (*_ADAM, *_ADAGRAD)
        and tensor.dtype in _ROUNDING
    ]
    shapes = {info.name: info.shape for info in tensors.values()}
    indexed = _by_index(states, parameter_names, shapes) if checkpoint.ordered else {}
    options: dict[str, list[TensorInfo]] = {}
    for tensor in states:
        name = indexed.get(tensor.container)
        target = canonical.get(name) if name is not None else _parameter_named(tensor, by_name)
        if target is not None:
            options.setdefault(target, []).append(tensor)
    found: dict[str, TensorInfo] = {}
    for target, candidates in options.items():
        shape = tensors[target].shape
        rows = ((*shape[:1], 1), shape[:1]) if target.startswith("tables.") else ()
        adam = [tensor for tensor in candidates if _last_key(tensor) in _ADAM]
        for tensor in adam or candidates:
            if tensor.shape in (shape, *rows):
                found.setdefault(target, tensor)
    return found


def is_accumulator(state: TensorInfo) -> bool:
    """Tell Adagrad's sum of squared gradients, which only grows, from Adam's decayed mean."""
    return _last_key(state) in _ADAGRAD


def read_initial_value(checkpoint: FlatCheckpoint, state: TensorInfo) -> float:
    """Return what an accumulator held before training: Adagrad may start above zero.

    torch's optimizers keep it in `param_groups`, beside `state`. 0 if it is not stored, or if the
    groups disagree.
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


def subtract_initial(values: Float64Array, dtype: str, initial: float) -> Float64Array:
    """Return what was added since the accumulator held `initial`; its dtype sets the rounding."""
    if not initial:
        return values
    untouched = values <= initial * (1 + _ROUNDING[dtype])
    return np.where(untouched, 0.0, values - initial)


def _last_key(tensor: TensorInfo) -> str:
    return tensor.name.rsplit(".", maxsplit=1)[-1]


def _by_index(
    states: list[TensorInfo],
    parameter_names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[tuple[str, ...], str]:
    """Return container of a state -> parameter, for states keyed by parameter index.

    An optimizer of some of the parameters, or with groups in another order, numbers them
    differently. If the shape of one state contradicts its index, no index of that optimizer is
    trusted.
    """
    names: dict[tuple[str, ...], str] = {}
    distrusted: set[tuple[str, ...]] = set()
    for tensor in states:
        container = tensor.container
        if len(container) < 2 or container[-2] != "state" or not container[-1].isdecimal():
            continue
        index = int(container[-1][:7])
        name = parameter_names[index] if index < len(parameter_names) else ""
        shape = shapes.get(name, ())
        names[container] = name
        if tensor.shape not in (shape, shape[:1], (*shape[:1], 1)):
            distrusted.add(container[:-2])
    return {key: name for key, name in names.items() if key[:-2] not in distrusted}


def _parameter_named(tensor: TensorInfo, by_name: Mapping[str, str]) -> str | None:
    """Find a parameter's name within the path of a state."""
    for path in dict.fromkeys((strip_wrappers(tensor.path), tensor.path)):
        parts = path.split(".")
        for end in range(len(parts) - 1, 0, -1):
            for start in range(end):
                target = by_name.get(".".join(parts[start:end]))
                if target is not None:
                    return target
    return None
