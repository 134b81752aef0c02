"""Find, per table, the accumulator that tells how often its rows were trained.

Adagrad's `sum` (rows, N), row-wise Adagrad's `momentum` or `momentum1` (rows,) and Adam's
`exp_avg_sq` (rows, N) all stay at zero for a row that no batch ever touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dmt_convert.architectures.matching import Match
from dmt_convert.architectures.name_map import strip_wrappers
from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo

_ACCUMULATORS: Final = ("sum", "momentum1", "momentum", "exp_avg_sq")


def find_row_state(checkpoint: FlatCheckpoint, match: Match) -> Mapping[str, TensorInfo]:
    """Return table -> accumulator; tables without one are left out.

    Handles states keyed by parameter name (DCP, fused optimizers) and by parameter index
    (a plain `optimizer.state_dict()`, whose order is that of the model's tensors).
    """
    tables = {
        info.name: name.removeprefix("tables.").removesuffix(".weight")
        for name, info in match.tensors.items()
        if name.startswith("tables.")
    }
    by_name = {
        strip_wrappers(name).removeprefix(match.prefix): table for name, table in tables.items()
    }
    shapes = {info.name: info.shape for info in match.tensors.values()}
    states = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.container != match.container and _last_key(tensor) in _ACCUMULATORS
    ]
    indexed = _by_index(states, match, shapes) if checkpoint.ordered else {}
    found: dict[str, TensorInfo] = {}
    for tensor in states:
        name = indexed.get(tensor.container)
        table = tables.get(name) if name is not None else _table_named(tensor, by_name)
        if table is None:
            continue
        rows, dim = match.tensors[f"tables.{table}.weight"].shape
        if tensor.shape in ((rows,), (rows, 1), (rows, dim)):
            found.setdefault(table, tensor)
    return found


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


def _table_named(tensor: TensorInfo, by_name: Mapping[str, str]) -> str | None:
    """Find a table's parameter name within the path of a state."""
    parts = strip_wrappers(tensor.path).split(".")
    for end in range(len(parts) - 1, 0, -1):
        for start in range(end):
            table = by_name.get(".".join(parts[start:end]))
            if table is not None:
                return table
    return None
