"""Our own graphs over the shared file: what an export writes, without the copy that a bundle needs.

A bundle has one file per tower; here all towers and all models share one, so that its pages are in
memory once. The writers are those of `dmt export`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_case import TOWERS, Case, Inputs, graph_inputs, tower_spec
from serving_weights import WEIGHTS

from dmt_convert.checkpoint import TensorInfo, read_safetensors
from dmt_convert.config import ExportConfig, ExportFormat
from dmt_convert.model import DmtSpec
from dmt_convert.serving import OVER_ARCH, WHOLE, tower_name
from dmt_convert.serving.exporter import ExportJob
from dmt_convert.serving.placed_weights import PlacedFile, PlacedWeights


def build_job(
    out: Path, case: Case, weights: Path, *, export_format: ExportFormat, function: str, towers: int
) -> ExportJob:
    """Say what to write.

    Args:
        out: Folder of the graphs; gets the weights by hard link.
        case: What is served.
        weights: The shared file.
        export_format: onnx or pt2.
        function: flat, c2 or c4.
        towers: How many towers; a flat model is one.
    """
    assert towers in (1, TOWERS)
    spec = tower_spec(case.model, case.rows, function, towers)
    placed = _place(weights, spec, f"{case.model}.{function}.")
    for file in (*placed.towers, placed.over_arch):
        (out / file.path).parent.mkdir()
        (out / file.path).hardlink_to(weights)
    return ExportJob(
        folder=out,
        spec=spec,
        inputs=graph_inputs(case.form),
        weights=placed,
        config=ExportConfig(format=export_format, pooling_input=case.form),  # type: ignore[arg-type]
    )


def _place(weights: Path, spec: DmtSpec, prefix: str) -> PlacedWeights:
    """Show every part its own tensors of the one file, under the names that it expects."""
    infos = {info.name: info for info in read_safetensors(weights).tensors}
    size = weights.stat().st_size

    def show(part: str, tensors: dict[str, TensorInfo]) -> PlacedFile:
        return PlacedFile(path=f"{part}/{WEIGHTS}", tensors=tensors, bytes=size, digests={})

    def under(prefix: str) -> dict[str, TensorInfo]:
        return {k.removeprefix(prefix): info for k, info in infos.items() if k.startswith(prefix)}

    towers = []
    for t, tower in enumerate(spec.towers):
        names = [f"tables.{spec.flat.table_of(f).name}.weight" for f in tower.features]
        tables = {name: infos[name] for name in names}
        towers.append(show(tower_name(t), tables | under(f"{prefix}{tower_name(t)}.")))
    dense = {k: v for k, v in under(prefix).items() if not k.startswith("tower_0")}
    return PlacedWeights(towers=tuple(towers), over_arch=show(OVER_ARCH, dense))


def write_onnx(job: ExportJob, part: str) -> Path:
    """Write the whole graph, or the one tower's, whose output are the pooled embeddings."""
    from dmt_convert.serving.onnx_writer import OnnxGraphs

    path = job.folder / f"{part}.onnx"
    if part == "lookup":
        OnnxGraphs(job).write_tower(0, path)
    else:
        OnnxGraphs(job).write_whole(path)
    return path


def write_pt2(job: ExportJob, part: str) -> Path:
    """Compile the whole graph, or the one tower's, for this processor."""
    from serving_pt2 import SharedBuilder

    from dmt_convert.serving.pt2 import CompileJob, compile_part

    name = tower_name(0) if part == "lookup" else WHOLE
    compile_job = CompileJob(
        folder=str(job.folder),
        model=job.spec.to_json(),
        inputs=job.inputs.to_json(),
        towers=tuple(file.path for file in job.weights.towers),
        over_arch=job.weights.over_arch.path,
        parts={name: f"{part}.pt2"},
        packed=False,
        clip=False,
        device="cpu",
    )
    compile_part(SharedBuilder(compile_job, job.weights), name)
    return job.folder / f"{part}.pt2"


def open_pt2(graph: Path, case: Case, threads: int) -> tuple[Callable[[Inputs], Any], Any]:
    """Open a package with the loader that comes with every export."""
    import torch

    from dmt_convert.serving.load_pt2 import Graph

    torch.set_num_threads(threads)
    opened = Graph(graph)
    ours = graph_inputs(case.form)

    def prepare(inputs: Inputs) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in inputs.feeds(ours).items()}

    return prepare, opened
