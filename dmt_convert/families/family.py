"""What a family is: how its checkpoints are recognised, and how they become a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from dmt_convert.checkpoint import FlatCheckpoint
from dmt_convert.families.model_info import FlatModelInfo, ModelPlace
from dmt_convert.families.name_map import strip_wrappers
from dmt_convert.families.trainer_tensors import TrainerTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(ABC):
    """A family of models: those that one trainer saves, under its names."""

    name: str
    """Name of the family, as `--model-config` and `dmt inspect` spell it."""
    trainer: str
    """Who writes such checkpoints, for messages."""
    anchor: str
    """Regular expression of a table's name, by which the family is recognised. Its group `prefix`
    is what precedes the model's own names, its group `table` is the name of the table."""

    def matches(self, checkpoint: FlatCheckpoint) -> list[ModelPlace]:
        """Return where the checkpoint holds models of this family, judging by tensor names."""
        found: dict[ModelPlace, None] = {}
        for tensor in checkpoint.tensors:
            match = re.fullmatch(self.anchor, strip_wrappers(tensor.name))
            if match is not None:
                found[ModelPlace(container=tensor.container, prefix=match["prefix"])] = None
        return list(found)

    @abstractmethod
    def describe(self, source: TrainerTensors) -> FlatModelInfo:
        """Describe a model of this family.

        Args:
            source: Its tensors; `source.config` is what the user says about it.

        Raises:
            ArchitectureError: Tensors are missing, misshapen or left over, or the model is one of
                the trainer's that cannot be converted.
            ConfigError: What the user says does not fit the tensors.
        """
