"""What inference yields: the spec, where its tensors are, and how each fact was come by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dmt_convert.checkpoint import FlatCheckpoint, TensorInfo
from dmt_convert.families.facts import Fact, Source
from dmt_convert.families.optimizer_state import is_accumulator
from dmt_convert.spec import ModelSpec

__all__ = ["Fact", "FlatModelInfo", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatModelInfo:
    """A flat checkpoint whose architecture is understood."""

    checkpoint: FlatCheckpoint
    """The opened checkpoint."""
    spec: ModelSpec
    """What kind of model it is."""
    tensors: Mapping[str, TensorInfo]
    """Canonical name -> tensor; see `name_map`."""
    optimizer_state: Mapping[str, TensorInfo]
    """Canonical name -> the optimizer's accumulator of squared gradients, where the checkpoint
    holds one: as the tensor in shape, or one number per row of a table."""
    facts: tuple[Fact, ...]
    """How each part of the spec was come by."""
    ignored: tuple[str, ...]
    """What the checkpoint holds beside the model, one line each."""

    def table_info(self, table: str) -> TensorInfo:
        """Return the tensor of a table."""
        return self.tensors[f"tables.{table}.weight"]

    @property
    def row_state(self) -> dict[str, TensorInfo]:
        """Table -> its accumulator, where there is one: shape (rows, ...)."""
        return {
            name.removeprefix("tables.").removesuffix(".weight"): info
            for name, info in self.optimizer_state.items()
            if name.startswith("tables.")
        }

    @property
    def accumulators(self) -> dict[str, TensorInfo]:
        """Table -> Adagrad's sum of squared gradients, where there is one: as `row_state`.

        A derived table has none: its gradients are not those of what it is made of.
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
