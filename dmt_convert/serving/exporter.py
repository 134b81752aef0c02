"""Export a bundle, and what a format has to do: write the graphs of a model in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from dmt_convert import __version__
from dmt_convert.adapter import user_file
from dmt_convert.bundle import Bundle, check_digests
from dmt_convert.config import ExportConfig, ExportFormat
from dmt_convert.documents import GraphCheck, WeightsFile, digest_document, to_json
from dmt_convert.files import EXPORT, check_free, staged_folder
from dmt_convert.model import DmtSpec
from dmt_convert.progress import Progress, no_progress
from dmt_convert.serving.checks import check_graphs
from dmt_convert.serving.export_config import plan_inputs, request_features
from dmt_convert.serving.export_files import digest_files
from dmt_convert.serving.export_manifest import (
    EXPORT_MANIFEST,
    ExportedBundle,
    ExportManifest,
    list_sent,
)
from dmt_convert.serving.graph_inputs import GraphInputs
from dmt_convert.serving.placed_weights import (
    PlacedFile,
    PlacedWeights,
    place_weights,
    placed_bytes,
)
from dmt_convert.serving.quantisation import (
    check_auc_limit,
    check_auc_lost,
    measure_quantisation,
)

_CHECKED_BYTES: Final = 4 << 30
"""Up to this size, weights are compared with their digests by default; larger ones take long."""
_GRAPH_BYTES: Final = 64 << 20
"""Room for graphs, documents and weights outside tables."""
_WRITERS: Final = {
    "onnx": "dmt_convert.serving.onnx_writer:OnnxWriter",
    "pt2": "dmt_convert.serving.pt2:Pt2Writer",
    "triton": "dmt_convert.serving.triton:TritonWriter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """All that the graphs of an export depend on."""

    folder: Path
    """The export's folder while it is being written."""
    spec: DmtSpec
    """The converted model."""
    inputs: GraphInputs
    """What its graphs take."""
    weights: PlacedWeights
    """Its weights, already below `folder`."""
    config: ExportConfig
    """What is asked for."""
    generation: str = ""
    """8 hex digits: two exports have the same only if they were made of the same weights, in the
    same way, by the same versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a format wrote."""

    parts: Mapping[str, str]
    """Part (`whole`, `tower_000`, ..., `over_arch`) -> its graph's file below the folder."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What `export.json` should say of this format."""


class GraphWriter(Protocol):
    """A format; made with the config and the generation of the export."""

    format: ExportFormat

    def folder_of(self, part: str) -> str:
        """Folder of a part's weights below the export; its graph lies there or above."""
        ...

    def write(self, job: ExportJob, on_part: Callable[[int, int], None]) -> Written:
        """Write all graphs, and what else the format needs.

        Args:
            job: What to write.
            on_part: Told of graphs done and in all, for progress.

        Raises:
            ExportError: The format cannot express what is asked for.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an export came to."""

    path: Path
    """Its folder."""
    manifest: ExportManifest
    """Its `export.json`."""
    checks: tuple[GraphCheck, ...]
    """What was run before it was put in place."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Export {self.path}: {self.manifest.format}, {len(self.manifest.parts)} graphs>"


def export_bundle(
    bundle: Bundle,
    out: Path,
    config: ExportConfig,
    *,
    on_quality: Callable[[Mapping[str, Any]], None] = lambda quality: None,
    progress: Progress = no_progress,
) -> Export:
    """Export a bundle; nothing is left in place unless every graph answers like the model.

    Args:
        bundle: The bundle.
        out: The export's folder; must not exist.
        config: What is asked for.
        on_quality: Told what quantisation costs, before anything is written.
        progress: Told of step, done and total.

    Raises:
        BundleError: The bundle is damaged, or the target cannot be written.
        DataError: The data does not fit the model or the form of the inputs.
        ExportError: The format cannot do what is asked for, or a graph does not answer like the
            model.
    """
    check_free(out, EXPORT)
    user_file(bundle.manifest.model.flat)
    inputs = plan_inputs(bundle.manifest.model, config, request_features(bundle, config))
    generation = _generation_of(bundle, inputs, config)
    writer = load_writer(config, generation)
    check_auc_limit(config.max_auc_loss, config.quantize, config.data)
    _check_weights(bundle, config.checksums, progress)
    quality = measure_quantisation(bundle, inputs, config.quantize, config.data, progress)
    if quality:
        on_quality(quality)
        check_auc_lost(quality, config.max_auc_loss)
    needed = _GRAPH_BYTES + placed_bytes(
        bundle, out.parent, config.quantize, copy=config.copy_weights
    )
    with staged_folder(out, needed_bytes=needed, output=EXPORT) as staging:
        weights = place_weights(
            bundle,
            staging,
            writer.folder_of,
            quantize=config.quantize,
            copy=config.copy_weights,
            progress=progress,
        )
        job = ExportJob(
            folder=staging,
            spec=bundle.manifest.model,
            inputs=inputs,
            weights=weights,
            config=config,
            generation=generation,
        )
        written = writer.write(job, lambda done, total: progress("exporting", done, total))
        manifest = _describe(bundle, job, written, quality)
        manifest = replace(manifest, files=digest_files(staging, manifest.weights)).sealed()
        _write_manifest(staging, manifest)
        checks = check_graphs(staging, bundle.path, config.data, progress, user_file(job.spec.flat))
        manifest = replace(manifest, checks=checks).sealed()
        _write_manifest(staging, manifest)
        _settle(staging)
        bundle.check_in_place()  # files of it were linked, and compared with, by their names
    return Export(path=out, manifest=manifest, checks=checks)


def _describe(
    bundle: Bundle, job: ExportJob, written: Written, quality: Mapping[str, Any]
) -> ExportManifest:
    """Say what was exported; digests of its files and results of checks are added later."""
    return ExportManifest(
        format=job.config.format,
        model=job.spec,
        inputs=job.inputs,
        columns=bundle.manifest.inputs,
        parts=written.parts,
        towers=list_sent(job.spec),
        weights=_describe_weights(job.weights),
        bundle=ExportedBundle(
            name=bundle.path.absolute().name,
            tool_version=bundle.manifest.tool.version,
            source_digest=bundle.manifest.source.digest,
        ),
        quantize=job.config.quantize,
        out_of_range=job.config.out_of_range,
        gpu=job.config.gpu,
        details=written.details,
        quality=quality,
    )


def load_writer(config: ExportConfig, generation: str) -> GraphWriter:
    """Make the writer of a format; each needs packages of its own."""
    module, _, attribute = _WRITERS[config.format].partition(":")
    writer: GraphWriter = getattr(import_module(module), attribute)(config, generation)
    return writer


def _generation_of(bundle: Bundle, inputs: GraphInputs, config: ExportConfig) -> str:
    made_of = {
        "weights": to_json(bundle.manifest)["weights"],
        "model": bundle.manifest.model.to_json(),
        "inputs": inputs.to_json(),
        "settings": [config.format, config.quantize, config.out_of_range, config.gpu],
        **({} if config.gpus is None else {"gpus": config.gpus}),
        "versions": [__version__, torch.__version__],
    }
    return digest_document(made_of).removeprefix("sha256:")[:8]


def _check_weights(bundle: Bundle, all_digests: bool | None, progress: Progress) -> None:
    """Compare weights with their digests: those beside tables always."""
    size = sum(table.nbytes for table in bundle.manifest.model.flat.tables)
    everything = size <= _CHECKED_BYTES if all_digests is None else all_digests
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress("checking", done, size if everything else 0)

    def wanted(tensor: str) -> bool:
        """Exports hold no accumulators; tables are many bytes."""
        return not tensor.endswith(".accumulator") and (
            everything or not tensor.startswith("tables.")
        )

    check_digests(bundle, count, wanted=wanted)


def _describe_weights(weights: PlacedWeights) -> dict[str, WeightsFile]:
    files: tuple[PlacedFile, ...] = (*weights.towers, weights.over_arch)
    return {file.path: WeightsFile(bytes=file.bytes, digests=file.digests) for file in files}


def _write_manifest(folder: Path, manifest: ExportManifest) -> None:
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    (folder / EXPORT_MANIFEST).write_text(text, encoding="utf-8")


def _settle(folder: Path) -> None:
    """Bring every file to the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:  # shared weights are on the disk already
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
