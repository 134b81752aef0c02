"""The compiler of pt2 graphs, shown the one file of weights as if every part had its own."""

from __future__ import annotations

from typing import Any

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.serving.load_pt2 import MappedFile
from dmt_convert.serving.placed_weights import PlacedFile, PlacedWeights
from dmt_convert.serving.pt2 import CompileJob, MappedGraphs


class SharedBuilder(MappedGraphs):
    """Takes the tensors of a part from where they lie in the shared file.

    Args:
        job: What to build.
        weights: The tensors of every part, by the names that a bundle gives them.
    """

    def __init__(self, job: CompileJob, weights: PlacedWeights) -> None:
        super().__init__(job)
        files: list[PlacedFile] = [*weights.towers, weights.over_arch]
        self._placed = {file.path: file for file in files}

    def _file(self, path: str) -> tuple[MappedFile, dict[str, TensorInfo]]:
        mapped, _ = super()._file(path)
        return mapped, dict(self._placed[path].tensors)

    def _source(self, path: str, names: tuple[str, ...], rows: int | None = None) -> dict[str, Any]:
        source = super()._source(path, names, rows)
        infos = self._placed[path].tensors
        return {**source, "tensors": [infos[name].name for name in names]}
