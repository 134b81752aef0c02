"""The flat model as a plain torch module. Letters: B batch, N embedding dim, M all widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dmt_convert.checkpoint import check_finite, read_tensor
from dmt_convert.data import Batch
from dmt_convert.errors import ArchitectureError
from dmt_convert.families import FlatModelInfo
from dmt_convert.model.dense_parts import Interaction, Mlp
from dmt_convert.model.table_lookup import MappedTables, TrainableTables, to_tensor
from dmt_convert.spec import ModelSpec

Stages = Iterator[tuple[str, Tensor]]
_INNER: Final = ("cross.", "branch1.", "branch2.", "network.")
"""Canonical names that belong to the interaction."""
_MAX_WHOLE: Final = 1 << 24
"""Up to here float32 holds every whole number."""


class FlatModel(nn.Module):
    """dense_arch, tables, interaction, over_arch: one logit per row.

    Args:
        spec: The model.
        tables: Pooled lookups; trainable tables in memory by default.
    """

    def __init__(self, spec: ModelSpec, tables: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.tables = TrainableTables(spec) if tables is None else tables
        self.dense_arch = Mlp(spec.dense_arch)
        self.interaction = Interaction(spec.interaction, spec.input_dims)
        self.over_arch = Mlp(spec.over_arch)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        pooled = [
            self.tables(name, bag)
            for name, bag in zip(batch.feature_names, batch.bags, strict=True)
        ]
        return self.forward_pooled(to_tensor(batch.dense), torch.cat(pooled, dim=1))

    def forward_pooled(self, dense_BD: Tensor, pooled_BM: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense inputs and pooled embeddings side by side."""
        logits: Tensor = self.over_arch(self.interact(dense_BD, pooled_BM))
        return logits.squeeze(1)

    def interact(self, dense_BD: Tensor, pooled_BM: Tensor) -> Tensor:
        """Return what over_arch takes, shape (B, width)."""
        dense_BN = self.dense_arch(dense_BD)
        interacted: Tensor = self.interaction(dense_BN, pooled_BM, dense_BN)
        return interacted

    def stages(self, batch: Batch) -> Stages:
        """Yield every intermediate result in the order in which it comes to be."""
        pooled = []
        for name, bag in zip(batch.feature_names, batch.bags, strict=True):
            pooled.append(self.tables(name, bag))
            yield f"pooled embedding of {name}", pooled[-1]
        yield from self._dense_stages(to_tensor(batch.dense), torch.cat(pooled, dim=1))

    def _dense_stages(self, dense_BD: Tensor, pooled_BM: Tensor) -> Stages:
        dense_BN = self.dense_arch(dense_BD)
        yield "dense_arch", dense_BN
        x = self.interaction(dense_BN, pooled_BM, dense_BN)
        yield "interaction", x
        yield from over_arch_stages(self.over_arch, x)


def over_arch_stages(over_arch: Mlp, x: Tensor) -> Stages:
    """Yield the pre-activations of every over_arch layer; the last one is the logit."""
    if not len(over_arch):  # a network gives the logit itself
        yield "logit", x.squeeze(1)
    for i, layer in enumerate(over_arch):
        x = layer(x)
        last = i == len(over_arch) - 1
        yield "logit" if last else f"over_arch layer {i}", x.squeeze(1) if last else x
        x = torch.relu(x)


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
    arrays: Mapping[str, np.ndarray],
    origins: Mapping[str, str] | None = None,
) -> None:
    """Give a model's dense parts their weights, as float32 (integer buffers keep their type).

    Args:
        model: The model, dense parts on the meta device or in memory.
        arrays: Canonical name -> array.
        origins: Canonical name -> what the checkpoint calls it, for errors.

    Raises:
        CheckpointError: An array holds NaN or Inf.
        ArchitectureError: They are not the tensors of the model's network, or hold whole numbers
            that float32 does not.
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


def _check_whole_numbers(array: np.ndarray, origin: str) -> None:
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
    return f"interaction.{canonical}" if canonical.startswith(_INNER) else canonical


def as_state(array: np.ndarray, like: Tensor | None) -> Tensor:
    """Make a tensor of an array, of the type that the model computes with.

    Args:
        array: Numbers.
        like: The model's own tensor; float32 where it has none.
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
