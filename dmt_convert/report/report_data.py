"""What a report is made of. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dmt_convert.conversion.partition import Partition
from dmt_convert.documents import QualityRow
from dmt_convert.families import Fact
from dmt_convert.model import DmtSpec
from dmt_convert.placement import TowerPlan

FLAT_ROW: Final = "flat"
"""Name of the quality row of the flat model."""
YARDSTICK_ROWS: Final = ("random initialisation",)
"""Names of quality rows that only serve as a yardstick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that a report says."""

    title: str
    """Name of the source."""
    tool_version: str
    """Version of dmt-convert."""
    source: Mapping[str, Any]
    """format, files [{name, bytes}], nbytes (or bytes), digest; each may be missing."""
    facts: Sequence[Fact]
    """How the flat model was understood."""
    spec: DmtSpec
    """The converted model."""
    partition: Partition
    """The towers, and how they came about."""
    plan: TowerPlan
    """Where the towers go."""
    initialisation_method: str
    """How tower modules and over_arch were initialised."""
    initialisation_notes: Sequence[str]
    """What the initialisation says of each part, one line each."""
    sample_description: str
    """What moments and affinity were measured on."""
    quality: Sequence[QualityRow]
    """The flat model, the converted one, yardsticks; may be empty."""
    quality_data: str
    """What the agreement was measured on."""
    labelled_data: str | None
    """What AUC, log loss and NE were measured on, where labels are known."""
    weight_files: Sequence[tuple[str, int]]
    """Name and bytes of every weight file of the bundle."""
    commands: Sequence[str]
    """Commands to copy."""
    finetune: Mapping[str, Any] | None = None
    """How the bundle was fine-tuned: `finetune` of the manifest's initialisation."""
    figure: str | None = None
    """The partition as an `<svg>` element; None draws it here."""

    def __post_init__(self) -> None:
        assert self.partition.assignment == self.spec.assignment, "towers differ"
        assert len(self.plan.tower_hosts) == len(self.spec.towers), "the plan is another's"

    @property
    def flat(self) -> QualityRow | None:
        """The quality row of the flat model."""
        return next((row for row in self.quality if row.name == FLAT_ROW), None)

    @property
    def converted(self) -> QualityRow | None:
        """The quality row of the model that was written: the last that is no yardstick."""
        others = (FLAT_ROW, *YARDSTICK_ROWS)
        return next((row for row in reversed(self.quality) if row.name not in others), None)
