"""The process that compiles graphs: `python -m dmt_convert.serving.pt2_compile`.

Reads a `CompileJob` as one line of JSON, then one name of a part per line; answers each with one
line of JSON. A process of its own, so that compiling leaves no settings and no memory behind, and
so that two parts can be compiled at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from dmt_convert.adapter import load_adapter
from dmt_convert.checkpoint import SafetensorsReader, TensorInfo
from dmt_convert.model import DmtModel, DmtSpec
from dmt_convert.serving.export_manifest import OVER_ARCH, WHOLE, tower_name
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
from dmt_convert.serving.pt2_linear import OneDnnLinear
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
    """The user's file that defines the model, where there is one."""

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))


class MappedGraphs:
    """Builds the graphs of an export over mapped weights: no table is read.

    Args:
        job: What to build.
    """

    def __init__(self, job: CompileJob) -> None:
        self.job = job
        if job.model_file:
            load_adapter(Path(job.model_file))
        self.spec = DmtSpec.from_json(job.model)
        self.inputs = GraphInputs.from_json(job.inputs)
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
        return graph.to(self.job.device).eval(), weights

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
            [[self._value(source) for source in parts] for parts in sources],
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
        graph = OverArchGraph(self._model, list_over_arch_inputs(self.spec, self.inputs))
        self._model.towers = nn.ModuleList()
        path = self.job.over_arch
        names = {OverArchGraph.weight_name(name): name for name in self._file(path)[1]}
        self._assign(graph, names, path, prefix, weights)
        return graph

    def _assign(
        self,
        graph: nn.Module,
        names: Mapping[str, str],
        path: str,
        prefix: str,
        weights: dict[str, dict[str, Any]],
    ) -> None:
        """Give a graph its weights: key in the graph -> name in the file."""
        own = {k: v for k, v in graph.state_dict().items() if not k.startswith("lookup.")}
        assert own.keys() == names.keys(), own.keys() ^ names.keys()
        sources = {key: self._source(path, (name,)) for key, name in names.items()}
        state = {
            key: self._value(source)
            if own[key].is_floating_point()
            # files hold a network's integers as fp32
            else self._mapped(source).to(own[key].dtype)
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
            tensors = SafetensorsReader().read(self._folder / path).tensors
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

    def _value(self, source: Mapping[str, Any]) -> Tensor:
        """Return a weight, mapped; on a GPU only room for it, since compiling reads none."""
        if self.job.device != "cpu":
            kind: torch.dtype = getattr(torch, source["dtype"])
            return torch.empty(source["shape"], dtype=kind, device=self.job.device)
        return self._mapped(source)

    def _mapped(self, source: Mapping[str, Any]) -> Tensor:
        file, _ = self._file(source["file"])
        return file.view(source["tensors"], source["dtype"], source["shape"])


def _is_rows(name: str) -> bool:
    return name.startswith("tables.") and name.endswith((".weight", ".quantized"))


def _offset(infos: Mapping[str, TensorInfo], table: str) -> int:
    name = f"tables.{table}.quantized"
    info = infos[name if name in infos else f"tables.{table}.weight"]
    return info.pieces[0].offset


def trace_graph(graph: Graph, device: str) -> torch.export.ExportedProgram:
    """Trace a graph for any number of rows."""
    examples, free = traced(graph.inputs, device)
    with torch.no_grad(), OneDnnLinear(device):
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
    program = trace_graph(graph, job.device)
    weights = name_constants(program) | weights
    path = Path(job.folder) / job.parts[part]
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs=_settings(_describe(builder, graph, path, weights), job.device),
    )


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


if __name__ == "__main__":
    sys.exit(main())
