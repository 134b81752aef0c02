"""The format pt2: every graph an AOTInductor package, its weights beside it.

A package holds machine code and no weights: `load_pt2.py`, which is copied into the export, maps
the `.safetensors` files into memory and hands them over. Code for the CPU runs on every machine
with at least the vector instructions of the one that compiled it (AVX2 or AVX-512).

Graphs are compiled by processes of their own, `python -m dmt_convert.serving.pt2`, so that
compiling leaves no settings and no memory behind, and so that two parts can be compiled at a
time. Each reads a `CompileJob` as one line of JSON, then one name of a part per line, and answers
each with one line of JSON.

Tables are not there while a graph is compiled: a fake tensor has their shape and no memory. So
compiling takes as much memory for 1 TB of tables as for 1 MB, on a GPU too.

Packages for CUDA are compiled on a machine with CUDA; this has not been tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dmt_convert.adapter import load_adapter, user_file
from dmt_convert.checkpoint import TensorInfo, read_safetensors
from dmt_convert.child import python_command, python_environment
from dmt_convert.config import ExportConfig, ExportFormat
from dmt_convert.errors import ExportError
from dmt_convert.model import DmtModel, DmtSpec
from dmt_convert.serving import load_pt2
from dmt_convert.serving.columns import Columns
from dmt_convert.serving.export_manifest import CODE_PREFIX, OVER_ARCH, WHOLE, tower_name
from dmt_convert.serving.exporter import ExportJob, Written
from dmt_convert.serving.gpu import check_gpu, check_room
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.graphs import (
    Graph,
    OverArchGraph,
    TowerGraph,
    WholeGraph,
    list_inputs,
    list_over_arch_inputs,
    traced,
)
from dmt_convert.serving.load_pt2 import MappedFile
from dmt_convert.serving.pt2_lookup import TowerLookup, stack_tables

_TORCH_NAMES: Final = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "uint8": "uint8",
}
_MARCH: Final = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
"""What g++ calls the machines that torch's own kernels know: a package runs on all such, and not
only on the very processor that compiled it (which is what `native` would give)."""
LOADER: Final = "load_pt2.py"
_MAX_WORKERS: Final = 2
"""Compiler processes at a time: each takes up to 1 GB and a core."""
Worker = tuple["subprocess.Popen[str]", IO[str]]


class OneDnnLinear(TorchFunctionMode):
    """While active, `torch.nn.functional.linear` is traced as oneDNN's operator.

    Args:
        device: cpu or cuda; nothing changes for graphs of a GPU, nor where torch has no oneDNN.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._active = device == "cpu" and torch._C._has_mkldnn

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace linear layers; all else is called as it is."""
        if func is functional.linear and self._active:
            if isinstance(args[0], Columns):
                with self:  # for the products of its parts
                    return args[0].linear(*args[1:], **(kwargs or {}))
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """All that a graph of an export depends on."""

    folder: str
    """The export's folder while it is being written."""
    model: Mapping[str, Any]
    """`DmtSpec.to_json()`."""
    inputs: Mapping[str, Any]
    """`GraphInputs.to_json()`."""
    towers: tuple[str, ...]
    """Weights file of every tower, below the folder."""
    over_arch: str
    """Weights file of what is outside towers."""
    parts: Mapping[str, str]
    """Part -> its graph's file below the folder."""
    packed: bool
    """Whether quantised tables hold two columns per byte."""
    clip: bool
    """Whether ids outside their table take the nearest row."""
    device: str
    """cpu or cuda."""
    model_file: str = ""
    """The user's file that defines the model, if there is one."""

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))


class MappedGraphs:
    """Builds the graphs of an export, over fake tables and mapped weights beside them.

    Args:
        job: What to build.
    """

    def __init__(self, job: CompileJob) -> None:
        self.job = job
        if job.model_file:
            load_adapter(Path(job.model_file))
        self.spec = DmtSpec.from_json(job.model)
        self.inputs = GraphInputs.from_json(job.inputs)
        self.fakes = FakeTensorMode(
            shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True
        )
        self._folder = Path(job.folder)
        self._files: dict[str, tuple[MappedFile, dict[str, TensorInfo]]] = {}

    def build(self, part: str) -> tuple[Graph, dict[str, dict[str, Any]]]:
        """Return a graph, and for each of its constants where its value comes from."""
        weights: dict[str, dict[str, Any]] = {}
        if part == OVER_ARCH:
            graph: Graph = self._over_arch("", weights)
        elif part == WHOLE:
            towers = [self._tower(t, f"towers.{t}.", weights) for t in range(len(self.spec.towers))]
            over_arch = self._over_arch("over_arch.", weights)
            graph = WholeGraph(towers, over_arch, list_inputs(self.inputs, None))
        else:
            indices = {tower_name(t): t for t in range(len(self.spec.towers))}
            graph = self._tower(indices[part], "", weights)
        for name, buffer in graph.named_buffers():
            weights.setdefault(name, _values(buffer))
        for module in graph.modules():  # its parameters are there; fake ones cannot be moved
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.job.device))
        return graph.eval(), weights

    def _tower(self, index: int, prefix: str, weights: dict[str, dict[str, Any]]) -> TowerGraph:
        flat, features = self.spec.flat, self.spec.towers[index].features
        path = self.job.towers[index]
        _, infos = self._file(path)
        tables = [name.split(".", 1)[1].rsplit(".", 1)[0] for name in infos if _is_rows(name)]
        tables.sort(key=lambda table: _offset(infos, table))
        stacks = stack_tables(flat, tables, infos, packed=self.job.packed)
        sources = [
            [
                self._source(path, stack.names(suffix), rows=sum(stack.rows))
                for suffix in stack.suffixes
            ]
            for stack in stacks
        ]
        lookup = TowerLookup(
            flat,
            features,
            self.inputs,
            stacks,
            [[self._fake(source) for source in parts] for parts in sources],
            clip=self.job.clip,
        )
        for i, (stack, parts) in enumerate(zip(stacks, sources, strict=True)):
            for suffix, source in zip(stack.suffixes, parts, strict=True):
                weights[f"{prefix}lookup.stack_{i}_{suffix[1:]}"] = source
        names = {name: name for name in infos if name.startswith("tower_module.")}
        graph = TowerGraph(
            lookup,
            self._model.tower_list[index].tower_module,
            list_inputs(self.inputs, features),
        )
        self._assign(graph, names, path, prefix, weights)
        return graph

    def _over_arch(self, prefix: str, weights: dict[str, dict[str, Any]]) -> OverArchGraph:
        self._load_codes()
        graph = OverArchGraph(self._model, list_over_arch_inputs(self.spec, self.inputs))
        path = self.job.over_arch
        names = {OverArchGraph.weight_name(name): name for name in self._file(path)[1]}
        self._assign(graph, names, path, prefix, weights)
        return graph

    def _load_codes(self) -> None:
        """Give the towers' codes their ranges, which stay in the over_arch graph as constants."""
        for path, tower in zip(self.job.towers, self._model.tower_list, strict=True):
            code = getattr(tower.tower_module, "code", None)
            names = [] if code is None else [name for name, _ in code.named_buffers()]
            for name in names:
                setattr(code, name, self._mapped(self._source(path, (f"{CODE_PREFIX}{name}",))))

    def _assign(
        self,
        graph: nn.Module,
        names: Mapping[str, str],
        path: str,
        prefix: str,
        weights: dict[str, dict[str, Any]],
    ) -> None:
        """Give a graph its weights: key in the graph -> name in the file."""
        elsewhere = ("lookup.", "codes.")
        own = {k: v for k, v in graph.state_dict().items() if not k.startswith(elsewhere)}
        assert own.keys() == names.keys(), own.keys() ^ names.keys()
        sources = {key: self._source(path, (name,)) for key, name in names.items()}
        state = {
            # files hold a network's integers as fp32
            key: self._mapped(source).to(
                self.job.device, None if own[key].is_floating_point() else own[key].dtype
            )
            for key, source in sources.items()
        }
        graph.load_state_dict(state, strict=False, assign=True)
        weights |= {
            f"{prefix}{key}": source
            for key, source in sources.items()
            if own[key].is_floating_point()
        }

    @cached_property
    def _model(self) -> DmtModel:
        with torch.device("meta"):
            return DmtModel(self.spec, [nn.Identity() for _ in self.spec.towers])

    def _file(self, path: str) -> tuple[MappedFile, dict[str, TensorInfo]]:
        if path not in self._files:
            tensors = read_safetensors(self._folder / path).tensors
            infos = {tensor.name: tensor for tensor in tensors}
            self._files[path] = MappedFile(self._folder / path), infos
        return self._files[path]

    def _source(self, path: str, names: tuple[str, ...], rows: int | None = None) -> dict[str, Any]:
        info = self._file(path)[1][names[0]]
        shape = list(info.shape) if rows is None else [rows, *info.shape[1:]]
        return {
            "file": path,
            "tensors": list(names),
            "dtype": _TORCH_NAMES[info.dtype],
            "shape": shape,
        }

    def _fake(self, source: Mapping[str, Any]) -> Tensor:
        """Return the shape of tables.

        Other weights must be real: inductor writes the values of small ones into the code.
        """
        kind: torch.dtype = getattr(torch, source["dtype"])
        with self.fakes:
            return torch.empty(source["shape"], dtype=kind, device=self.job.device)

    def _mapped(self, source: Mapping[str, Any]) -> Tensor:
        file, _ = self._file(source["file"])
        return file.view(source["tensors"], source["dtype"], source["shape"])


def _is_rows(name: str) -> bool:
    return name.startswith("tables.") and name.endswith((".weight", ".quantized"))


def _offset(infos: Mapping[str, TensorInfo], table: str) -> int:
    name = f"tables.{table}.quantized"
    info = infos[name if name in infos else f"tables.{table}.weight"]
    return info.pieces[0].offset


def trace_graph(graph: Graph, device: str, fakes: FakeTensorMode) -> torch.export.ExportedProgram:
    """Trace a graph for any number of rows.

    Args:
        graph: The graph.
        device: cpu or cuda.
        fakes: The mode of those of its weights that are fake.
    """
    examples, free = traced(graph.inputs, device)
    with torch.no_grad(), tracing(TracingContext(fakes)), OneDnnLinear(device):
        return torch.export.export(
            graph,
            examples,
            dynamic_shapes=(free,),
            strict=False,
        )


def name_constants(program: torch.export.ExportedProgram) -> dict[str, dict[str, Any]]:
    """Let tensors that a network's code holds keep their names; inductor would call them otherwise.

    Args:
        program: A traced graph; literals and plain attributes of its modules become buffers.

    Returns:
        Where the values of all its constants come from, as `MappedGraphs.build` says it.
    """
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False
    return {
        name: _values(value) for name, value in program.constants.items() if torch.is_tensor(value)
    }


def _values(tensor: Tensor) -> dict[str, Any]:
    return {"values": tensor.tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def compile_part(builder: MappedGraphs, part: str) -> None:
    """Compile one graph to its `.pt2` file."""
    job = builder.job
    graph, weights = builder.build(part)
    program = trace_graph(graph, job.device, builder.fakes)
    weights = name_constants(program) | weights
    path = Path(job.folder) / job.parts[part]
    with _fakes_apart():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs=_settings(_describe(builder, graph, path, weights), job.device),
        )


@contextmanager
def _fakes_apart() -> Iterator[None]:
    """Keep inductor from joining tables of one shape.

    It holds constants of one address for the same, and fake tensors all have the address 0.
    """
    module: Any = import_module("torch._inductor.graph")  # takes seconds
    same = module.is_same_tensor

    def is_same(data: Tensor, value: Tensor) -> bool:
        fake = isinstance(data, FakeTensor) or isinstance(value, FakeTensor)
        return data is value if fake else bool(same(data, value))

    module.is_same_tensor = is_same
    try:
        yield
    finally:
        module.is_same_tensor = same


def _describe(
    builder: MappedGraphs, graph: Graph, path: Path, weights: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `load_pt2.py` has to know of a package."""
    root = Path(builder.job.folder)
    names = {entry.name for entry in graph.inputs}

    def beside(entry: Mapping[str, Any]) -> dict[str, Any]:
        if "file" not in entry:
            return dict(entry)
        return {**entry, "file": str((root / entry["file"]).relative_to(path.parent))}

    weights = {name: beside(entry) for name, entry in weights.items()}
    return {
        "inputs": [entry.to_json() for entry in graph.inputs],
        "ids": [
            {
                "name": form.ids,
                "lengths": form.lengths,
                "rows": builder.spec.flat.table_of(form.feature).rows,
                "lowest": -1 if form.form == "padded" else 0,
            }
            for form in builder.inputs.features
            if form.ids in names
        ],
        "files": sorted({entry["file"] for entry in weights.values() if "file" in entry}),
        "weights": weights,
        "device": builder.job.device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_capability() if builder.job.device == "cuda" else None,
        "torch": torch.__version__,
    }


def _settings(described: Mapping[str, Any], device: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {"dmt": json.dumps(described)},
        "cpp.dynamic_threads": True,  # else the package starts as many as there were here
    }
    march = _MARCH.get(described["cpu"])
    if march is not None and device == "cpu" and platform.machine() == "x86_64":
        settings["cpp.march"] = march
    return settings


def main() -> int:
    """Compile what standard input asks for."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    job = CompileJob(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            part = line.strip()
            compile_part(MappedGraphs(job), part)
            answers.write(json.dumps({"part": part}) + "\n")
            answers.flush()
    return 0


class Pt2Writer:
    """Compiles the graphs of an export.

    Args:
        config: What is asked for.
        generation: Not used: a server loads another folder to change.

    Raises:
        ExportError: There is no C++ compiler, or no GPU for a graph that is to run on one.
    """

    format: ExportFormat = "pt2"

    def __init__(self, config: ExportConfig, generation: str = "") -> None:
        # here, and not when graphs are written: weights may take long to be put in place
        if config.gpu:
            check_gpu()
        self._compiler = _find_compiler()

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return part

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """See `GraphWriter.write`."""
        parts = {WHOLE: "whole.pt2"}
        parts |= {tower_name(t): f"{tower_name(t)}/tower.pt2" for t in range(len(job.spec.towers))}
        parts[OVER_ARCH] = f"{OVER_ARCH}/over_arch.pt2"
        skipped = check_room(job) if job.config.gpu else {}
        parts = {part: path for part, path in parts.items() if part not in skipped}
        compile_job = CompileJob(
            folder=str(job.folder),
            model=job.spec.to_json(),
            inputs=job.inputs.to_json(),
            towers=tuple(file.path for file in job.weights.towers),
            over_arch=job.weights.over_arch.path,
            parts=parts,
            packed=job.config.quantize == "int4",
            clip=job.config.out_of_range == "clip",
            device="cuda" if job.config.gpu else "cpu",
            model_file=str(user_file(job.spec.flat) or ""),
        )
        on_part(0, len(parts))
        for done, _ in enumerate(_compile(compile_job), start=1):
            on_part(done, len(parts))
        source = Path(load_pt2.__file__)
        (job.folder / LOADER).write_bytes(source.read_bytes())
        return Written(
            parts=parts,
            details={
                "torch": torch.__version__,
                "compiler": self._compiler,
                "device": compile_job.device,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "loader": LOADER,
                **({"skipped": skipped} if skipped else {}),
            },
        )


def _find_compiler() -> str:
    """Return the first line that the C++ compiler says of its version.

    Raises:
        ExportError: The machine has no C++ compiler.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is not None:
        asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout:
            return asked.stdout.splitlines()[0]
    raise ExportError(
        f"no C++ compiler: {name} cannot be run",
        expected="a compiler for AOTInductor, such as g++ 10 or later",
        hint="apt-get install g++, or set the environment variable CXX to another compiler; "
        "--format onnx needs no compiler",
    )


def _compile(job: CompileJob) -> Iterator[str]:
    """Compile all parts, in processes of their own; yield their names as they get done.

    Raises:
        ExportError: A part cannot be compiled.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for part in job.parts:
        waiting.put(part)
    done: queue.SimpleQueue[str | ExportError] = queue.SimpleQueue()
    # compilers for a GPU also run kernels there, to choose between them: one at a time
    most = _MAX_WORKERS if job.device == "cpu" else 1
    count = min(most, len(os.sched_getaffinity(0)), len(job.parts))
    workers: list[Worker] = []
    threads: list[threading.Thread] = []
    with ExitStack() as logs:
        try:
            for _ in range(count):
                workers.append(_start(job, logs))
                threads.append(threading.Thread(target=_feed, args=(*workers[-1], waiting, done)))
                threads[-1].start()
            for _ in job.parts:
                answer = done.get()
                if isinstance(answer, ExportError):
                    raise answer
                yield answer
        finally:
            _stop(workers, threads)


def _start(job: CompileJob, logs: ExitStack) -> Worker:
    log = logs.enter_context(
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    )
    process = subprocess.Popen(
        python_command("-m", "dmt_convert.serving.pt2"),
        env=python_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(job.to_json() + "\n")
    return process, log


def _stop(workers: Sequence[Worker], threads: Sequence[threading.Thread]) -> None:
    """End the processes, and with them the compilers that they may have started."""
    for process, _ in workers:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    for process, _ in workers:
        process.communicate()


def _feed(
    process: subprocess.Popen[str],
    log: IO[str],
    waiting: queue.SimpleQueue[str],
    done: queue.SimpleQueue[str | ExportError],
) -> None:
    """Give one process part after part until none is left, or it fails."""
    assert process.stdin is not None and process.stdout is not None
    while True:
        try:
            part = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(part + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it died, or was ended because another one failed
            answer = ""
        if not answer:
            done.put(_failed(part, process, log))
            return
        done.put(str(json.loads(answer)["part"]))


def _failed(part: str, process: subprocess.Popen[str], log: IO[str]) -> ExportError:
    code = process.wait()
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    return ExportError(
        f"the graph {part!r} cannot be compiled (the process ended with code {code})",
        hint="check whether memory or disk ran out (a part needs about 1 GB). Otherwise report the "
        "lines below; --format onnx needs no compiler",
        details=lines[-12:],
    )


if __name__ == "__main__":
    sys.exit(main())
