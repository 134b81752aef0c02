"""An export, opened and asked like any other model, and the runtimes that run its graphs.

Letters: B batch, O tower output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from dmt_convert.arrays import AnyArray, Float32Array
from dmt_convert.checkpoint import read_safetensors, read_tensor
from dmt_convert.data import Batch
from dmt_convert.errors import DataError, ExportError
from dmt_convert.model import Code, DmtSpec
from dmt_convert.serving.export_files import ExportFiles, consent_error
from dmt_convert.serving.export_manifest import (
    CODE_PREFIX,
    OVER_ARCH,
    TOWER_WEIGHTS,
    WHOLE,
    ExportManifest,
    read_export_manifest,
    tower_name,
)
from dmt_convert.serving.gpu import SPARE_BYTES, free_gpu_bytes
from dmt_convert.serving.graph_inputs import PADDING
from dmt_convert.serving.load_pt2 import Graph

if TYPE_CHECKING:
    import onnxruntime as ort

_SUFFIXES: Final = (".onnx", ".pt2")
_CPU_PROVIDER: Final = "CPUExecutionProvider"
_CUDA_PROVIDER: Final = "CUDAExecutionProvider"


class GraphRunner(Protocol):
    """An opened graph."""

    runs_on: str
    """What runs it: cpu, cuda:0, or ONNX Runtime's provider."""

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """Return its one output, shape (B, columns).

        Args:
            feeds: Its inputs by name; others are ignored.

        Raises:
            DataError: The graph refuses them.
        """
        ...


class OnnxRunner:
    """A graph in ONNX Runtime.

    Args:
        path: The `.onnx` file; its weights are memory-mapped.
        threads: Threads inside operators; 0 for one per core.
        gpu: Whether it runs on a GPU if ONNX Runtime can use one here; else on the CPU.

    Raises:
        ExportError: The file cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int = 0, gpu: bool = False) -> None:
        self._path = path
        self._session = _open_session(path, threads, gpu=gpu)
        # the first one takes what it can; CUDA's is left out if it cannot be started
        self.runs_on = self._session.get_providers()[0]
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """See `GraphRunner.run`."""
        try:
            (output,) = self._session.run(None, _select(self._path, feeds, self._inputs))
        except Exception as error:  # what ONNX Runtime raises has no base class of its own
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise refused(self._path, error) from None
        assert isinstance(output, np.ndarray)
        return output


def _open_session(path: Path, threads: int, *, gpu: bool) -> ort.InferenceSession:
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
    providers: list[str | tuple[str, dict[str, str]]] = [_CPU_PROVIDER]
    if gpu and _CUDA_PROVIDER in ort.get_available_providers():
        # TF32, its default, rounds products to 10 bits
        providers.insert(0, (_CUDA_PROVIDER, {"use_tf32": "0"}))
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        hint = "copy the export again, or export the bundle again"
        if "escapes model directory" in str(error):
            hint = (
                "its weights are symbolic links, which ONNX Runtime does not follow to another "
                "folder than the graph's own: cp -rL EXPORT COPY, and use the copy"
            )
        raise ExportError(
            f"{path} cannot be loaded by ONNX Runtime ({_first_line(error)})",
            expected="a graph that `dmt export` wrote, with its weights beside it",
            hint=hint,
        ) from None


def _select(path: Path, feeds: Mapping[str, AnyArray], names: list[str]) -> dict[str, AnyArray]:
    missing = [name for name in names if name not in feeds]
    if missing:
        raise ExportError(
            f"the graph {path} takes inputs that its export.json does not describe: "
            f"{', '.join(map(repr, missing))}",
            expected="the graph and the export.json of one export",
            hint="copy the export again, or export the bundle again",
        )
    return {name: feeds[name] for name in names}


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
    """A graph compiled by AOTInductor; its weights are memory-mapped, or on its GPU.

    On a CPU it runs on torch's threads, as many as `torch.set_num_threads` says.

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
        self.runs_on = str(self._graph.device)

    def run(self, feeds: Mapping[str, AnyArray]) -> AnyArray:
        """See `GraphRunner.run`."""
        wanted = _select(self._path, feeds, [entry["name"] for entry in self._graph.inputs])
        tensors = {
            name: torch.from_numpy(np.require(array, None, ["C", "W"]))
            for name, array in wanted.items()
        }
        try:
            output = self._graph(tensors)
        except ValueError as error:
            raise refused(self._path, error) from None
        array: AnyArray = output.cpu().numpy()
        return array


class ExportedModel:
    """The graphs of an export, each checked and opened when it is first asked.

    On a GPU, others are closed first if there is no room for the next one.

    Args:
        path: The export's folder.
        trust_code: Whether graphs of machine code (`.pt2`) may be loaded, which runs them.
        checked: Whether graph and weights are compared with their digests before they are used.

    Raises:
        ExportError: The folder is not an export, or it is damaged.
    """

    def __init__(self, path: Path, *, trust_code: bool = False, checked: bool = True) -> None:
        self.path = path
        self.manifest: ExportManifest = read_export_manifest(path)
        self._files = ExportFiles(path, self.manifest)
        self._trust_code, self._is_checked = trust_code, checked
        self._runners: dict[str, GraphRunner] = {}
        self._runs_on: set[str] = set()
        self._codes: dict[int, Code] = {}

    def check_files(self) -> None:
        """Compare every file with its digest; what was used already was compared then.

        Raises:
            ExportError: A file is not what was exported.
        """
        self._files.check_all()

    @property
    def runs_on(self) -> str:
        """What has run its graphs so far; see `GraphRunner.runs_on`."""
        return ", ".join(sorted(self._runs_on))

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
        """Return what arrives of one tower, shape (B, O); one row where it runs per request."""
        sent, code = self._send(index, batch), self.code(index)
        if code is None or not code.packs:
            return sent
        arrived: Float32Array = code.unpack(torch.from_numpy(sent)).numpy()
        return arrived

    def _send(self, index: int, batch: Batch) -> AnyArray:
        """Return what one tower's graph gives."""
        features = self.spec.towers[index].features
        return self._run(tower_name(index), self.manifest.inputs.feeds(batch, features))

    def code(self, index: int) -> Code | None:
        """Return the code of a tower, with the ranges in its weights file."""
        module = self.spec.towers[index].module
        if module.code is None:
            return None
        if index not in self._codes:
            code = self._codes[index] = Code(module.code, self.spec.tower_widths[index])
            folder = (self.path / self.manifest.parts[tower_name(index)]).parent
            for info in read_safetensors(folder / TOWER_WEIGHTS).tensors:
                if info.name.startswith(CODE_PREFIX):
                    name = info.name.removeprefix(CODE_PREFIX)
                    code.get_buffer(name).copy_(torch.from_numpy(np.array(read_tensor(info))))
        return self._codes[index]

    def joined(self, batch: Batch, sent: Sequence[Sequence[AnyArray]] = ()) -> Float32Array:
        """Return logits, shape (B,), from the tower graphs and the over_arch graph.

        Args:
            batch: The rows.
            sent: What `sent` gave for every tower, if that is known.
        """
        inputs, logits = self.manifest.inputs, []
        requests = list(inputs.requests(batch))
        sent = sent or [
            [self._send(t, request) for request in requests] for t in range(len(self.spec.towers))
        ]
        for i, request in enumerate(requests):
            feeds = inputs.dense_feed(request)
            feeds |= {tower_name(t): arrays[i] for t, arrays in enumerate(sent)}
            logits.append(self._run(OVER_ARCH, feeds)[:, 0])
        return np.concatenate(logits)

    def sent(self, index: int, batch: Batch) -> list[AnyArray]:
        """Return what one tower's graph gives for every request of a batch."""
        return [self._send(index, request) for request in self.manifest.inputs.requests(batch)]

    def whole(self, batch: Batch) -> Float32Array:
        """Return logits, shape (B,), from the whole-model graph."""
        inputs = self.manifest.inputs
        return np.concatenate(
            [self._run(WHOLE, inputs.feeds(request))[:, 0] for request in inputs.requests(batch)]
        )

    def _run(self, part: str, feeds: Mapping[str, AnyArray]) -> AnyArray:
        try:
            output = self._runner(part).run(feeds)
        except DataError as error:
            raise self._bad_id(feeds) or error from None
        return output

    def _bad_id(self, feeds: Mapping[str, AnyArray]) -> DataError | None:
        """Name the id for which a graph refused its inputs, if it was one."""
        for feature in self.manifest.inputs.features:
            ids = feeds.get(feature.ids, np.empty(0, dtype=np.int64))
            rows = self.spec.flat.table_of(feature.feature).rows
            lowest = PADDING if feature.form == "padded" else 0
            bad = ids[(ids < lowest) | (ids >= rows)]
            if bad.size:
                return DataError(
                    f"id {int(bad[0])} of feature {feature.feature!r} is outside its table, which "
                    f"has {rows} rows",
                    expected=f"ids from 0 to {rows - 1}"
                    + (f", and {PADDING} for padding" if lowest else ""),
                    hint="correct the ids, or export with --out-of-range clip",
                )
        return None

    def _runner(self, part: str) -> GraphRunner:
        if part not in self._runners:
            name = self.manifest.parts.get(part)
            if name is None or not name.endswith(_SUFFIXES):
                raise ExportError(
                    f"the export {self.path} has no graph {part!r}",
                    expected=f"one of {', '.join(self.manifest.parts)}",
                    hint="export the bundle again",
                )
            self._make_room(part)
            self._runners[part] = self._open(name)
            self._runs_on.add(self._runners[part].runs_on)
        return self._runners[part]

    def _make_room(self, part: str) -> None:
        """Close all graphs if the weights of the next one would not fit the GPU beside theirs."""
        if not self.manifest.gpu or not self._runners:
            return
        folder = (self.path / self.manifest.parts[part]).parent
        needed = SPARE_BYTES + sum(
            entry.bytes
            for name, entry in self.manifest.weights.items()
            if (self.path / name).is_relative_to(folder)
        )
        free = free_gpu_bytes()
        if free is None or needed > free:
            self._runners.clear()

    def _open(self, name: str) -> GraphRunner:
        path = self.path / name
        if path.suffix == ".pt2" and not self._trust_code:
            raise consent_error(path, has_digest=self._files.has_digests)
        if self._is_checked:
            self._files.check_graph(name)
        return open_graph(path, gpu=self.manifest.gpu)


def open_graph(path: Path, *, threads: int = 0, gpu: bool = False) -> GraphRunner:
    """Open one graph of an export.

    Args:
        path: Its `.onnx` or `.pt2` file.
        threads: Threads inside operators of an `.onnx` graph, 0 for one per core; `.pt2` graphs run
            on torch's threads.
        gpu: Whether an `.onnx` graph runs on a GPU, if ONNX Runtime can use one here; `.pt2` graphs
            run where they were compiled for.

    Raises:
        ExportError: It cannot be loaded.
    """
    if path.suffix == ".pt2":
        return Pt2Runner(path)
    return OnnxRunner(path, threads=threads, gpu=gpu)
