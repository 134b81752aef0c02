"""What a family makes of a checkpoint's tensors before their shapes are read.

A trainer may store a table in parts, or a layer in another form than ours. A family's `rewrite`
puts derived tensors in their place, and says what it found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dmt_convert.checkpoint import Scalar, TensorInfo
from dmt_convert.families.facts import Fact
from dmt_convert.families.model_config import ModelConfig
from dmt_convert.spec import InteractionKind


@dataclass(slots=True, kw_only=True)
class ModelTensors:
    """The tensors of one model, to be rewritten in place."""

    tensors: dict[str, TensorInfo]
    """Canonical name -> tensor; tables in the order of the file. A table in parts has a name per
    part, `tables.{table}.{part}`; only `tables.{table}.weight` may be left in the end."""
    scalars: Mapping[str, Scalar]
    """Plain values of the checkpoint, by dotted path."""
    config: ModelConfig
    """What the user says."""
    facts: list[Fact] = field(default_factory=list)
    """What was found."""
    missing: list[str] = field(default_factory=list)
    """Canonical names of tensors that should be there."""
    wrong: list[str] = field(default_factory=list)
    """What does not fit, one line each, with the trainer's names."""
    interaction: InteractionKind | None = None
    """The interaction, where the checkpoint says it in so many words."""
    order: Fact | None = None
    """Why the order of the tables is that of the interaction, whatever their numbers say."""

    def parts(self) -> dict[str, dict[str, TensorInfo]]:
        """Table -> part -> tensor, in the order of the file; the part of a plain one: `weight`."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            if name.startswith("tables."):
                table, part = name.removeprefix("tables.").rsplit(".", maxsplit=1)
                found.setdefault(table, {})[part] = info
        return found

    def set_tables(self, tables: Mapping[str, TensorInfo]) -> None:
        """Replace all tables and their parts."""
        rest = {n: info for n, info in self.tensors.items() if not n.startswith("tables.")}
        self.tensors = {f"tables.{n}.weight": info for n, info in tables.items()} | rest

    @property
    def dense_width(self) -> int | None:
        """Output width of dense_arch; None where its last layer is no matrix."""
        layers = [
            (int(parts[1]), info)
            for name, info in self.tensors.items()
            if (parts := name.split("."))[0] == "dense_arch"
            and parts[1].isdecimal()
            and parts[2] == "weight"
        ]
        shape = max(layers, key=lambda layer: layer[0])[1].shape if layers else ()
        return shape[0] if len(shape) == 2 else None
