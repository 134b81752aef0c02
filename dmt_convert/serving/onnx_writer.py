"""The ONNX format: one graph per tower, one over them, and one of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import ExportError
from dmt_convert.serving.export_config import ExportConfig
from dmt_convert.serving.export_manifest import OVER_ARCH, WHOLE, ExportFormat, tower_name
from dmt_convert.serving.graph_writer import ExportJob, Written
from dmt_convert.serving.onnx_graph import IR_VERSION, OPSET, GraphBuilder
from dmt_convert.serving.onnx_lookup import add_dense_input, add_inputs, pool_tower, rows_of
from dmt_convert.serving.onnx_over_arch import LOGITS, emit_logits
from dmt_convert.serving.onnx_requests import emit_request_logits
from dmt_convert.serving.onnx_tower import emit_tower

METADATA_SCHEMA: Final = 1
"""Raised when the texts inside the graphs can no longer be read as before."""
ONNX_DETAILS: Final = {"opset": OPSET, "ir_version": IR_VERSION}


class OnnxWriter:
    """Writes `whole.onnx` and, in folders of their own, `tower_000.onnx` and its like."""

    format: ExportFormat = "onnx"

    def __init__(self, config: ExportConfig) -> None:
        """Take nothing of it before `write`."""

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return part

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """See `GraphWriter.write`."""
        count = len(job.spec.towers)
        parts = {}
        for t in range(count):
            parts[tower_name(t)] = f"{tower_name(t)}/tower.onnx"
            write_tower_graph(job, t, job.folder / parts[tower_name(t)])
            on_part(t + 1, count + 2)
        parts[OVER_ARCH] = f"{OVER_ARCH}/{OVER_ARCH}.onnx"
        write_over_arch_graph(job, job.folder / parts[OVER_ARCH])
        on_part(count + 1, count + 2)
        parts[WHOLE] = f"{WHOLE}.onnx"
        write_whole_graph(job, job.folder / parts[WHOLE])
        on_part(count + 2, count + 2)
        return Written(parts=parts, details=dict(ONNX_DETAILS))


def write_tower_graph(job: ExportJob, tower: int, path: Path) -> None:
    """Write the graph of one tower: its features' inputs to `tower_000`, (B, O).

    Args:
        job: What is exported.
        tower: Which tower.
        path: The `.onnx` file; the tower's weights must lie in its folder, or below.
    """
    name = tower_name(tower)
    features = job.spec.towers[tower].features
    b = _builder(job, name, path, outputs=[name])
    add_inputs(b, job.inputs, features)
    emit_tower(b, job, tower, pool_tower(b, job, tower), name)
    b.output(name, "fp32", ["batch", job.spec.tower_widths[tower]])
    b.save(_metadata(job, name, features))


def write_over_arch_graph(job: ExportJob, path: Path) -> None:
    """Write the graph over the towers: dense inputs and all towers' outputs to `logits`, (B, 1).

    Args:
        job: What is exported.
        path: The `.onnx` file; the weights outside towers must lie in its folder, or below.
    """
    b = _builder(job, OVER_ARCH, path, outputs=[LOGITS])
    add_dense_input(b, job.inputs)
    emitted = []
    for t, width in enumerate(job.spec.tower_widths):
        rows = rows_of(job.inputs, job.spec.towers[t].features[0])
        emitted.append(b.input(tower_name(t), "fp32", [rows, width]))
    _emit_logits(b, job, emitted)
    b.output(LOGITS, "fp32", ["batch", 1])
    b.save(_metadata(job, OVER_ARCH, ()))


def write_whole_graph(job: ExportJob, path: Path) -> None:
    """Write the graph of the whole model: all inputs to `logits`, (B, 1).

    Args:
        job: What is exported.
        path: The `.onnx` file; all weights must lie in its folder, or below.
    """
    b = _builder(job, WHOLE, path, outputs=[LOGITS])
    add_inputs(b, job.inputs)
    emitted = []
    for t in range(len(job.spec.towers)):
        with b.scope(tower_name(t)):
            emitted.append(f"{b.prefix}emitted")
            emit_tower(b, job, t, pool_tower(b, job, t), emitted[-1])
    with b.scope(OVER_ARCH):
        _emit_logits(b, job, emitted)
    b.output(LOGITS, "fp32", ["batch", 1])
    b.save(_metadata(job, WHOLE, job.spec.flat.feature_names))


def _emit_logits(b: GraphBuilder, job: ExportJob, emitted: Sequence[str]) -> None:
    emit = emit_request_logits if job.inputs.per_request else emit_logits
    emit(b, job, job.inputs.dense if job.inputs.num_dense else None, emitted)


def _builder(job: ExportJob, name: str, path: Path, outputs: Sequence[str]) -> GraphBuilder:
    taken = sorted(set(outputs) & {*job.inputs.names})
    if taken:
        raise ExportError(
            f"a feature's input is called {taken[0]!r}, as the output of the {name} graph is",
            expected="features with other names than the graphs' outputs",
            hint="convert again with another name for it under `features` in --model-config",
        )
    return GraphBuilder(name, job.folder, path)


def _metadata(job: ExportJob, part: str, features: Sequence[str]) -> dict[str, str]:
    """Say in the graph itself what it is and takes."""
    flat, towers = job.spec.flat, job.spec.assignment.tower_of
    wanted = set(features)
    described: list[dict[str, Any]] = [
        {
            "name": feature.feature,
            "tower": tower_name(towers[feature.feature]),
            "table": flat.table_of(feature.feature).name,
            "rows": flat.table_of(feature.feature).rows,
            "dim": flat.table_of(feature.feature).dim,
            "pooling": next(f.pooling for f in flat.features if f.name == feature.feature),
            "form": feature.form,
            "weighted": feature.weighted,
            "inputs": list(feature.names),
        }
        for feature in job.inputs.features
        if feature.feature in wanted
    ]
    return {
        "dmt.schema_version": str(METADATA_SCHEMA),
        "dmt.part": part,
        "dmt.family": flat.family,
        "dmt.interaction": job.spec.interaction.kind,
        "dmt.tower_module": job.spec.kind,
        "dmt.towers": json.dumps([list(tower.features) for tower in job.spec.towers]),
        "dmt.features": json.dumps(described),
        "dmt.dense": json.dumps(
            {
                "name": job.inputs.dense if job.inputs.num_dense else None,
                "columns": job.inputs.num_dense,
            }
        ),
        "dmt.out_of_range": job.config.out_of_range,
        "dmt.quantize": job.config.quantize,
        "dmt.opset": str(OPSET),
    }
