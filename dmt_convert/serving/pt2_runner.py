"""Run one AOTInductor package of an export in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmt_convert.errors import ExportError
from dmt_convert.serving.graph_runner import refused
from dmt_convert.serving.load_pt2 import Graph

Array = npt.NDArray[Any]


class Pt2Runner:
    """A graph compiled by AOTInductor; its weights are memory-mapped.

    It runs on torch's threads, as many as `torch.set_num_threads` says.

    Args:
        path: The `.pt2` file.

    Raises:
        ExportError: The file cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._graph = Graph(path)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"{path} cannot be loaded by torch {torch.__version__} ({first})",
                expected="a package that `dmt export` compiled with this version of torch for a "
                "machine like this one, with its weights beside it",
                hint="copy the export again, or export the bundle again on this machine",
            ) from None

    def run(self, feeds: Mapping[str, Array]) -> Array:
        """See `GraphRunner.run`."""
        tensors = {
            entry["name"]: torch.from_numpy(np.require(feeds[entry["name"]], None, ["C", "W"]))
            for entry in self._graph.inputs
        }
        try:
            output = self._graph(tensors)
        except ValueError as error:
            raise refused(self._path, error) from None
        array: Array = output.cpu().numpy()
        return array
