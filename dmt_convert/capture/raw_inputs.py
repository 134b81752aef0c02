"""What a live module is called with: tensors with the batch first, and TorchRec's jagged ids.

Letters: B batch, F features.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmt_convert.errors import ConfigError

_HINT: Final = (
    "example is what the module is called with: a tuple of arguments, or a dict of arguments by "
    "name"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawInput:
    """One input of a module."""

    name: str
    """What the module calls it."""
    value: Any
    """A tensor with B rows, or a `KeyedJaggedTensor`."""

    @property
    def is_jagged(self) -> bool:
        """Whether it is a `KeyedJaggedTensor`."""
        return _is_jagged(self.value)

    @property
    def rows(self) -> int:
        """B."""
        return int(self.value.stride() if self.is_jagged else self.value.shape[0])

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it is made of."""
        return [self.value.values(), self.value.lengths()] if self.is_jagged else [self.value]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Return such an input, made of other tensors."""
        if not self.is_jagged:
            return tensors[0]
        return type(self.value)(keys=self.value.keys(), values=tensors[0], lengths=tensors[1])

    def redraw(self, rows: int, generator: torch.Generator) -> RawInput:
        """Return the same input for another number of rows, drawn from the example's."""
        chosen = torch.randint(self.rows, (rows,), generator=generator)
        if not self.is_jagged:
            value = self.value[chosen.to(self.value.device)].clone()
            return RawInput(name=self.name, value=value)
        keys = self.value.keys()
        lengths = self.value.lengths().reshape(len(keys), -1)[:, chosen].reshape(-1)
        most = int(self.value.values().max()) + 1 if self.value.values().numel() else 1
        ids = torch.randint(most, (int(lengths.sum()),), generator=generator)
        return RawInput(name=self.name, value=type(self.value)(keys, ids, lengths=lengths))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """All that a module is called with."""

    raw: tuple[RawInput, ...]
    """Its inputs that have rows."""
    leaves: tuple[Any, ...]
    """All leaves of the arguments; those with rows are replaced."""
    places: tuple[int, ...]
    """Where the inputs stand among the leaves."""
    spec: Any
    """How leaves become arguments and arguments by name."""

    @property
    def rows(self) -> int:
        """B."""
        return self.raw[0].rows

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all inputs, in order."""
        return [tensor for entry in self.raw for tensor in entry.tensors]

    def call(self, module: nn.Module, tensors: Sequence[Tensor] | None = None) -> Any:
        """Run a module, on other tensors if they are given."""
        left = list(self.tensors if tensors is None else tensors)
        leaves = list(self.leaves)
        for place, entry in zip(self.places, self.raw, strict=True):
            count = len(entry.tensors)
            leaves[place] = entry.rebuild(left[:count])
            left = left[count:]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return module(*args, **kwargs)

    def redraw(self, rows: int, seed: int) -> Inputs:
        """Return inputs of another number of rows; every input is drawn by itself."""
        generator = torch.Generator().manual_seed(seed)
        raw = tuple(entry.redraw(rows, generator) for entry in self.raw)
        return Inputs(raw=raw, leaves=self.leaves, places=self.places, spec=self.spec)

    def with_values(self, values: Mapping[int, Any]) -> Inputs:
        """Return the inputs with some of them replaced, by their index."""
        raw = tuple(
            RawInput(name=entry.name, value=values.get(i, entry.value))
            for i, entry in enumerate(self.raw)
        )
        return Inputs(raw=raw, leaves=self.leaves, places=self.places, spec=self.spec)


def read_example(module: nn.Module, example: object) -> Inputs:
    """Understand what a module is to be called with.

    Args:
        module: The module.
        example: A tuple of arguments; a dict of arguments by name; or the one argument.

    Raises:
        ConfigError: It holds no tensors, or they do not have the same number of rows.
    """
    args, kwargs = _as_arguments(module, example)
    paths, spec = pytree.tree_flatten_with_path((args, kwargs), is_leaf=_is_jagged)
    names = _name_leaves(module, [path for path, _ in paths])
    leaves = [leaf for _, leaf in paths]
    places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) or _is_jagged(leaf)]
    raw = tuple(RawInput(name=names[i], value=leaves[i]) for i in places)
    if not raw:
        raise ConfigError("the example holds no tensors", expected=_HINT)
    flat = [entry.name for entry in raw if not entry.is_jagged and not entry.value.ndim]
    rows = {entry.name: entry.rows for entry in raw if entry.name not in flat}
    if flat or len({*rows.values()}) > 1 or 0 in rows.values():
        found = ", ".join([f"{name}: {count}" for name, count in rows.items()] + flat)
        raise ConfigError(
            f"the example's inputs do not have the same number of rows ({found})",
            expected="tensors whose first dim is the batch",
            hint="make what is not per row a part of the module",
        )
    return Inputs(raw=raw, leaves=tuple(leaves), places=tuple(places), spec=spec)


def keyed_tensor(collection: Any, values: Tensor) -> Any:
    """Return what a TorchRec collection gives, made of other values, shape (B, sum N)."""
    from_torchrec = sys.modules["torchrec.sparse.jagged_tensor"]
    keys = list(collection._embedding_names)
    dims = list(collection._lengths_per_embedding)
    return from_torchrec.KeyedTensor(keys=keys, length_per_key=dims, values=values)


def _is_jagged(value: object) -> bool:
    return type(value).__name__ == "KeyedJaggedTensor"


def _as_arguments(module: nn.Module, example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict) and example and all(isinstance(key, str) for key in example):
        parameters = inspect.signature(module.forward).parameters
        if set(example) <= set(parameters):
            return (), example
    return (example,), {}


def _name_leaves(module: nn.Module, paths: Sequence[Any]) -> list[str]:
    """Name leaves by the innermost key, as far as these differ; else by all of them."""
    parameters = list(inspect.signature(module.forward).parameters)
    full = []
    for path in paths:
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        which, first, *rest = parts
        if which == "0":  # of the positional arguments
            first = parameters[int(first)] if int(first) < len(parameters) else f"input_{first}"
        full.append([first, *rest])
    short = [parts[-1] for parts in full]
    whole = len({*short}) < len(short) or any(name.isdigit() for name in short)
    return ["_".join(parts) if whole else name for parts, name in zip(full, short, strict=True)]
