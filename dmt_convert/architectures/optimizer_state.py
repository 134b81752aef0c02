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
        strip_wrappers(info.name): name.removeprefix("tables.").removesuffix(".weight")
        for name, info in match.tensors.items()
        if name.startswith("tables.")
    }
    by_index = {
        str(index): tables[strip_wrappers(name)]
        for index, name in enumerate(match.parameter_names)
        if strip_wrappers(name) in tables
    }
    rows = {
        name.removeprefix("tables.").removesuffix(".weight"): info.shape[0]
        for name, info in match.tensors.items()
        if name.startswith("tables.")
    }
    found: dict[str, TensorInfo] = {}
    for tensor in checkpoint.tensors:
        if tensor.container == match.container:
            continue
        table = _table_of(tensor, tables, by_index)
        if table is not None and tensor.shape[:1] == (rows[table],) and len(tensor.shape) <= 2:
            found.setdefault(table, tensor)
    return found


def _table_of(
    tensor: TensorInfo, tables: Mapping[str, str], by_index: Mapping[str, str]
) -> str | None:
    parts = tensor.path.split(".")
    if parts[-1] not in _ACCUMULATORS:
        return None
    if len(tensor.container) >= 2 and tensor.container[-2] == "state":
        key = tensor.container[-1]
        if key in by_index:
            return by_index[key]
        return tables.get(strip_wrappers(key))
    path = strip_wrappers(tensor.path)
    return next((table for name, table in tables.items() if f"{name}." in path), None)
