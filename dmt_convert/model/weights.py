"""A model's dense weights: their names, their types, and a flat model opened from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dmt_convert.arrays import AnyArray
from dmt_convert.checkpoint import check_finite, read_tensor
from dmt_convert.errors import ArchitectureError
from dmt_convert.families import FlatModelInfo
from dmt_convert.model.assembly import FlatModel
from dmt_convert.model.table_lookup import MappedTables

_PARTS: Final = ("dense_arch.", "dense_projection.", "restore.", "over_arch.")
"""Parts of a head whose canonical names are those of its state dict; all others are names inside
the interaction."""
_MAX_WHOLE: Final = 1 << 24
"""Up to here float32 holds every whole number."""


def open_flat_model(info: FlatModelInfo) -> FlatModel:
    """Build the flat model of a checkpoint: dense parts in memory, tables on disk.

    Raises:
        CheckpointError: A dense tensor holds NaN or Inf.
    """
    infos = {table.name: info.table_info(table.name) for table in info.spec.tables}
    with torch.device("meta"):
        model = FlatModel(info.spec, MappedTables(info.spec, infos))
    origins = {name: tensor.path for name, tensor in info.dense_tensors.items()}
    arrays = {name: read_tensor(tensor) for name, tensor in info.dense_tensors.items()}
    load_dense(model, arrays, origins)
    return model.eval()


def load_dense(
    model: nn.Module,
    arrays: Mapping[str, AnyArray],
    origins: Mapping[str, str] | None = None,
) -> None:
    """Give a model's dense parts their weights, as float32 (integer buffers keep their type).

    Args:
        model: The model, dense parts on the meta device or in memory.
        arrays: Canonical name -> array.
        origins: Canonical name -> name in the checkpoint, for errors.

    Raises:
        CheckpointError: An array holds NaN or Inf.
        ArchitectureError: They are not the tensors of the model's network, or hold whole numbers
            that float32 cannot hold.
    """
    own, state = model.state_dict(), {}
    for name, array in arrays.items():
        check_finite(array, (origins or {}).get(name, name))
        _check_whole_numbers(array, (origins or {}).get(name, name))
        state[state_name(name)] = as_state(array, own.get(state_name(name)))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise AssertionError(f"buffer {name} on the meta device")
    _check_network(own, state)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tables = [name for name in missing if not name.startswith(("tables.", "towers."))]
    assert not tables and not unexpected, (tables, unexpected)


def _check_whole_numbers(array: AnyArray, origin: str) -> None:
    """Refuse whole numbers that would be changed: bundles keep all dense tensors in float32."""
    if array.dtype.kind not in "iu" or not array.size or origin.endswith(".num_batches_tracked"):
        return
    largest = max(abs(int(array.min())), abs(int(array.max())))
    if largest > _MAX_WHOLE:
        raise ArchitectureError(
            f"{origin} holds whole numbers up to {largest}",
            expected=f"numbers up to {_MAX_WHOLE}, which float32 holds exactly",
            hint="make it a constant of the network's code, or a buffer with persistent=False",
        )


def state_name(canonical: str) -> str:
    """Name of a dense tensor in a model's state dict."""
    return canonical if canonical.startswith(_PARTS) else f"interaction.{canonical}"


def as_state(array: AnyArray, like: Tensor | None) -> Tensor:
    """Make a tensor of an array, of the type that the model computes with.

    Args:
        array: Numbers.
        like: The model's own tensor; None: float32.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensor if like is None else tensor.reshape(array.shape).to(like.dtype)


def _check_network(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not a network's; those of other models are checked by their family.

    Raises:
        ArchitectureError: A tensor is missing, unknown, or has another shape.
    """
    mine = {name for name in (*own, *state) if name.startswith("interaction.network.")}
    details = []
    for name in sorted(mine):
        shown = name.removeprefix("interaction.network.")
        if name not in state:
            details.append(f"missing: {shown} {list(own[name].shape)}")
        elif name not in own:
            details.append(f"extra: {shown} {list(state[name].shape)}")
        elif own[name].shape != state[name].shape:
            wrong, right = list(state[name].shape), list(own[name].shape)
            details.append(f"wrong shape: {shown} {wrong}, expected {right}")
    if details:
        raise ArchitectureError(
            f"the checkpoint does not hold the network's tensors: {len(details)} do not fit",
            expected="exactly the tensors of the network's state dict",
            hint="check that the checkpoint was saved whole, by the model that is described",
            details=details,
        )
