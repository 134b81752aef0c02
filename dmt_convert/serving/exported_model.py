"""An export, opened and asked like any other model, and the runtimes that run its graphs.

Letters: B batch, O tower output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from dmt_convert.arrays import AnyArray, Float32Array
from dmt_convert.data import Batch
from dmt_convert.errors import DataError, ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.export_manifest import (
    OVER_ARCH,
    WHOLE,
    ExportManifest,
    read_export_manifest,
    tower_name,
)
from dmt_convert.serving.load_pt2 import Graph

if TYPE_CHECKING:
    import onnxruntime as ort

_SUFFIXES: Final = (".onnx", ".pt2")


class GraphRunner(Protocol):
    """An opened graph."""

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """Return its one output, shape (B, width), float32.

        Args:
            feeds: Its inputs by name; others are ignored.

        Raises:
            DataError: The graph refuses them.
        """
        ...


class OnnxRunner:
    """A graph in ONNX Runtime, on the CPU.

    Args:
        path: The `.onnx` file; its weights are memory-mapped.
        threads: Threads inside operators; 0 for one per core.

    Raises:
        ExportError: The file cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._path = path
        self._session = _open_session(path, threads)
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """See `GraphRunner.run`."""
        try:
            (output,) = self._session.run(None, {name: feeds[name] for name in self._inputs})
        except Exception as error:  # what ONNX Runtime raises has no base class of its own
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise refused(self._path, error) from None
        assert isinstance(output, np.ndarray)
        return output


def _open_session(path: Path, threads: int) -> ort.InferenceSession:
    try:
        import onnxruntime as ort
    except ImportError:
        raise ExportError(
            "ONNX Runtime is not installed",
            hint="pip install onnxruntime",
        ) from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a graph that refuses its input says so in the exception
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ExportError(
            f"{path} cannot be loaded by ONNX Runtime ({_first_line(error)})",
            expected="a graph that `dmt export` wrote, with its weights beside it",
            hint="copy the export again, or export the bundle again",
        ) from None


def refused(path: Path, error: Exception) -> DataError:
    """Turn a runtime's complaint about the inputs into an error."""
    return DataError(
        f"the graph {path.name} refused its inputs ({_first_line(error)})",
        expected="ids from 0 to the number of rows of their table minus 1 (-1 fills padded bags)",
        hint="correct the ids, or export with --out-of-range clip",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """See `GraphRunner.run`."""
        tensors = {
            entry["name"]: torch.from_numpy(np.require(feeds[entry["name"]], None, ["C", "W"]))
            for entry in self._graph.inputs
        }
        try:
            output = self._graph(tensors)
        except ValueError as error:
            raise refused(self._path, error) from None
        array: AnyArray = output.cpu().numpy()
        return array


class ExportedModel:
    """The graphs of an export, each opened when it is first asked.

    Args:
        path: The export's folder.

    Raises:
        ExportError: The folder is not an export, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: ExportManifest = read_export_manifest(path)
        self._runners: dict[str, GraphRunner] = {}

    @property
    def spec(self) -> DmtSpec:
        """The converted model."""
        return self.manifest.model

    def score(self, batch: Batch) -> Float32Array:
        """Return logits, shape (B,): from the whole graph, or from towers and over_arch."""
        return self.whole(batch) if WHOLE in self.manifest.parts else self.joined(batch)

    def stages(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield what every tower gives, then the logits."""
        if not self.manifest.inputs.per_request:
            for t in range(len(self.spec.towers)):
                yield f"output of tower {t}", torch.from_numpy(self.tower(t, batch))
        yield "logit", torch.from_numpy(self.score(batch))

    def tower(self, index: int, batch: Batch) -> Float32Array:
        """Return what one tower's graph gives, shape (B, O); one row where it runs per request."""
        features = self.spec.towers[index].features
        output: Float32Array = self._runner(tower_name(index)).run(
            self.manifest.inputs.feeds(batch, features)
        )
        return output

    def joined(self, batch: Batch) -> Float32Array:
        """Return logits, shape (B,), from the tower graphs and the over_arch graph."""
        inputs, logits = self.manifest.inputs, []
        for request in inputs.requests(batch):
            feeds = inputs.dense_feed(request)
            feeds |= {tower_name(t): self.tower(t, request) for t in range(len(self.spec.towers))}
            logits.append(self._runner(OVER_ARCH).run(feeds)[:, 0])
        return np.concatenate(logits)

    def whole(self, batch: Batch) -> Float32Array:
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
