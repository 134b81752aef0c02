"""Run one exported graph in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dmt_convert.errors import DataError, ExportError

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]


class GraphRunner(Protocol):
    """An opened graph."""

    def run(self, feeds: Mapping[str, Array]) -> Array:
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

    def run(self, feeds: Mapping[str, Array]) -> Array:
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
            expected="the package onnxruntime, to run exported graphs",
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
    """Make an error of what a runtime says of the inputs."""
    return DataError(
        f"the graph {path.name} refused its inputs ({_first_line(error)})",
        expected="ids from 0 to the rows of their table, less one (-1 pads padded bags)",
        hint="mend the ids, or export with --out-of-range clip",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
