"""The ONNX format: one graph per tower, one over them, and one of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from dmt_convert.config import ExportConfig, ExportFormat
from dmt_convert.errors import ExportError
from dmt_convert.serving.export_manifest import OVER_ARCH, WHOLE, list_sent, tower_name
from dmt_convert.serving.exporter import ExportJob, Written
from dmt_convert.serving.onnx_dense import DenseNodes
from dmt_convert.serving.onnx_graph import IR_VERSION, OPSET, GraphBuilder
from dmt_convert.serving.onnx_lookup import add_dense_input, add_inputs, join, pool_tower, rows_of

LOGITS: Final = "logits"
"""Output of the over_arch and of the whole graph."""
GRAPH_TYPES: Final = {"float32": "fp32", "uint8": "uint8"}
"""Types of what towers send, as `GraphBuilder` calls them."""
METADATA_SCHEMA: Final = 1
"""Raised when the texts inside the graphs can no longer be read as before."""
ONNX_DETAILS: Final = {"opset": OPSET, "ir_version": IR_VERSION}


class OnnxWriter:
    """Writes `whole.onnx` and, in folders of their own, `tower_000.onnx` and its like.

    Args:
        config: What is asked for.
        generation: Not used: a server loads another folder to change.
    """

    format: ExportFormat = "onnx"

    def __init__(self, config: ExportConfig, generation: str = "") -> None:
        self.config = config

    def folder_of(self, part: str) -> str:
        """See `GraphWriter.folder_of`."""
        return part

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """See `GraphWriter.write`."""
        graphs = OnnxGraphs(job)
        count = len(job.spec.towers)
        parts = {}
        for t in range(count):
            parts[tower_name(t)] = f"{tower_name(t)}/tower.onnx"
            graphs.write_tower(t, job.folder / parts[tower_name(t)])
            on_part(t + 1, count + 2)
        parts[OVER_ARCH] = f"{OVER_ARCH}/{OVER_ARCH}.onnx"
        graphs.write_over_arch(job.folder / parts[OVER_ARCH])
        on_part(count + 1, count + 2)
        parts[WHOLE] = f"{WHOLE}.onnx"
        graphs.write_whole(job.folder / parts[WHOLE])
        on_part(count + 2, count + 2)
        return Written(parts=parts, details=dict(ONNX_DETAILS))


class OnnxGraphs:
    """Writes the graphs of an export: look-ups made here, dense parts by torch's exporter.

    Args:
        job: What is exported.
    """

    def __init__(self, job: ExportJob) -> None:
        self._job = job
        self._dense = DenseNodes(job)

    def write_tower(self, tower: int, path: Path) -> None:
        """Write the graph of one tower: its features' inputs to `tower_000`, what it sends.

        Args:
            tower: Which tower.
            path: The `.onnx` file; the tower's weights must lie in its folder, or below.
        """
        job, name = self._job, tower_name(tower)
        features = job.spec.towers[tower].features
        graph = _builder(job, name, path, outputs=[name])
        add_inputs(graph, job.inputs, features)
        self._add_tower(graph, tower, name)
        sent = list_sent(job.spec)[tower]
        graph.output(name, GRAPH_TYPES[sent.dtype], ["batch", sent.columns])
        graph.save(_metadata(job, name, features))

    def write_over_arch(self, path: Path) -> None:
        """Write the graph over the towers: dense inputs and their outputs to `logits`, (B, 1).

        Args:
            path: The `.onnx` file; the weights outside towers must lie in its folder, or below.
        """
        job = self._job
        graph = _builder(job, OVER_ARCH, path, outputs=[LOGITS])
        add_dense_input(graph, job.inputs)
        for tower, sent in zip(job.spec.towers, list_sent(job.spec), strict=True):
            rows = rows_of(job.inputs, tower.features[0])
            graph.input(sent.part, GRAPH_TYPES[sent.dtype], [rows, sent.columns])
        self._add_head(graph, [sent.part for sent in list_sent(job.spec)])
        graph.save(_metadata(job, OVER_ARCH, ()))

    def write_whole(self, path: Path) -> None:
        """Write the graph of the whole model: all inputs to `logits`, (B, 1).

        Args:
            path: The `.onnx` file; all weights must lie in its folder, or below.
        """
        job = self._job
        graph = _builder(job, WHOLE, path, outputs=[LOGITS])
        add_inputs(graph, job.inputs)
        sent = []
        for t in range(len(job.spec.towers)):
            with graph.scope(tower_name(t)):
                sent.append(f"{graph.prefix}sent")
                self._add_tower(graph, t, sent[-1])
        with graph.scope(OVER_ARCH):
            self._add_head(graph, sent)
        graph.save(_metadata(job, WHOLE, job.spec.flat.feature_names))

    def _add_tower(self, graph: GraphBuilder, tower: int, output: str) -> None:
        pieces = pool_tower(graph, self._job, tower)
        if self._dense.passes_on(tower):
            join(graph, pieces, output)
        else:
            self._dense.add_tower(graph, tower, join(graph, pieces), output)

    def _add_head(self, graph: GraphBuilder, sent: Sequence[str]) -> None:
        inputs = self._job.inputs
        dense = inputs.dense if inputs.num_dense else None
        self._dense.add_head(graph, dense, sent, LOGITS)
        graph.output(LOGITS, "fp32", ["batch", 1])


def _builder(job: ExportJob, name: str, path: Path, outputs: Sequence[str]) -> GraphBuilder:
    taken = sorted(set(outputs) & {*job.inputs.names})
    if taken:
        raise ExportError(
            f"a feature's input has the name of the {name} graph's output: {taken[0]!r}",
            hint="convert again, and rename the feature under `features` in --model-config",
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
