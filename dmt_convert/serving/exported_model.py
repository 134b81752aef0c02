"""An export, opened and asked like any other model. Letters: B batch, O tower output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmt_convert.data import Batch
from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.export_manifest import (
    OVER_ARCH,
    WHOLE,
    ExportManifest,
    read_export_manifest,
    tower_name,
)
from dmt_convert.serving.graph_runner import GraphRunner, OnnxRunner
from dmt_convert.serving.pt2_runner import Pt2Runner

_SUFFIXES: Final = (".onnx", ".pt2")


class ExportedModel:
    """The graphs of an export, each opened when it is first asked.

    Args:
        path: The export's folder.

    Raises:
        ExportError: It is no export, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: ExportManifest = read_export_manifest(path)
        self._runners: dict[str, GraphRunner] = {}

    @property
    def spec(self) -> DmtSpec:
        """The converted model."""
        return self.manifest.model

    def score(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return logits, shape (B,): from the whole graph, or from towers and over_arch."""
        return self.whole(batch) if WHOLE in self.manifest.parts else self.joined(batch)

    def stages(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield what every tower gives, then the logits."""
        if not self.manifest.inputs.per_request:
            for t in range(len(self.spec.towers)):
                yield f"output of tower {t}", torch.from_numpy(self.tower(t, batch))
        yield "logit", torch.from_numpy(self.score(batch))

    def tower(self, index: int, batch: Batch) -> npt.NDArray[np.float32]:
        """Return what one tower's graph gives, shape (B, O); one row where it runs per request."""
        features = self.spec.towers[index].features
        output: npt.NDArray[np.float32] = self._runner(tower_name(index)).run(
            self.manifest.inputs.feeds(batch, features)
        )
        return output

    def joined(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return logits, shape (B,), from the tower graphs and the over_arch graph."""
        inputs, logits = self.manifest.inputs, []
        for request in inputs.requests(batch):
            feeds = inputs.dense_feed(request)
            feeds |= {tower_name(t): self.tower(t, request) for t in range(len(self.spec.towers))}
            logits.append(self._runner(OVER_ARCH).run(feeds)[:, 0])
        return np.concatenate(logits)

    def whole(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return logits, shape (B,), from the whole-model graph."""
        inputs = self.manifest.inputs
        return np.concatenate(
            [
                self._runner(WHOLE).run(inputs.feeds(request))[:, 0]
                for request in inputs.requests(batch)
            ]
        )

    def _runner(self, part: str) -> GraphRunner:
        if part not in self._runners:
            name = self.manifest.parts.get(part)
            if name is None or not name.endswith(_SUFFIXES):
                raise ExportError(
                    f"the export {self.path} has no graph {part!r}",
                    expected=f"one of {', '.join(self.manifest.parts)}",
                    hint="export the bundle again",
                )
            self._runners[part] = open_graph(self.path / name)
        return self._runners[part]


def open_graph(path: Path, *, threads: int = 0) -> GraphRunner:
    """Open one graph of an export.

    Args:
        path: Its `.onnx` or `.pt2` file.
        threads: Threads inside operators of an `.onnx` graph, 0 for one per core; `.pt2` graphs run
            on torch's threads.

    Raises:
        ExportError: It cannot be loaded.
    """
    if path.suffix == ".pt2":
        return Pt2Runner(path)
    return OnnxRunner(path, threads=threads)
