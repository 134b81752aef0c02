"""What a format has to do: write the graphs of a model whose weights are in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dmt_convert.model import DmtSpec
from dmt_convert.serving.export_config import ExportConfig
from dmt_convert.serving.export_manifest import ExportFormat
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.placed_weights import PlacedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """All that the graphs of an export depend on."""

    folder: Path
    """The export's folder while it is being written."""
    spec: DmtSpec
    """The converted model."""
    inputs: GraphInputs
    """What its graphs take."""
    weights: PlacedWeights
    """Its weights, already below `folder`."""
    config: ExportConfig
    """What is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a format wrote."""

    parts: Mapping[str, str]
    """Part (`whole`, `tower_000`, ..., `over_arch`) -> its graph's file below the folder."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What `export.json` should say of this format."""


class GraphWriter(Protocol):
    """A format; made with the config of the export as its one argument."""

    format: ExportFormat

    def folder_of(self, part: str) -> str:
        """Folder of a part's weights below the export; its graph lies there or above."""
        ...

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """Write all graphs, and what else the format needs.

        Args:
            job: What to write.
            on_part: Told of graphs done and in all, for progress.

        Raises:
            ExportError: The format cannot express what is asked for.
        """
        ...
