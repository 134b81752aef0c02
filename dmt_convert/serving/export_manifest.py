"""`export.json`: what an export holds, how it is asked, and which model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from dmt_convert.config import ExportFormat, OutOfRange, TableCode
from dmt_convert.documents import (
    OMITTED_IF_EMPTY,
    OMITTED_IF_NONE,
    GraphCheck,
    InputRecord,
    Layout,
    Tool,
    WeightsFile,
    digest_document,
    from_json,
    to_json,
)
from dmt_convert.errors import ExportError
from dmt_convert.model import DmtSpec
from dmt_convert.serving.export_files import (
    FileDigest,
    check_names,
)
from dmt_convert.serving.graph_inputs import GraphInputs

EXPORT_MANIFEST: Final = "export.json"
EXPORT_SCHEMA: Final = 1
"""Raised when older versions would misread an export; not for a part that they can ignore."""
WHOLE: Final = "whole"
OVER_ARCH: Final = "over_arch"
TOWER_WEIGHTS: Final = "tower.safetensors"
"""File of a tower's weights, beside its graph."""
CODE_PREFIX: Final = "tower_module.code."
"""Beginning of the names of a code's ranges among a tower's weights."""
SentType = Literal["float32", "uint8"]


def tower_name(index: int) -> str:
    """Name of a tower's part, of its graph's output, and of its folder."""
    return f"tower_{index:03d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedBundle:
    """The bundle that an export was made of."""

    name: str = "unknown"
    """Name of its folder."""
    tool_version: str = "unknown"
    """Version of dmt-convert that wrote it."""
    source_digest: str | None = None
    """Digest of the flat model's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentTensor:
    """What the graph of a tower gives, and the over_arch graph takes: (B, columns)."""

    part: str
    """Name of the graph, and of the tensor."""
    dtype: SentType
    """uint8: packed levels of the tower's code. float32: the elements that arrive."""
    columns: int
    """Elements of the tensor per sample."""
    everywhere: bool = field(default=False, metadata=OMITTED_IF_EMPTY)
    """Whether its tables are meant to be on every host, beside the over_arch."""

    @property
    def nbytes(self) -> int:
        """Bytes per sample."""
        return self.columns * (1 if self.dtype == "uint8" else 4)


def list_sent(spec: DmtSpec) -> tuple[SentTensor, ...]:
    """Say in what form every tower's output travels between graphs.

    bf16 travels as float32, rounded: neither numpy nor Triton's ONNX Runtime backend has bf16.
    """
    sent = []
    for t, (tower, width) in enumerate(zip(spec.towers, spec.tower_widths, strict=True)):
        code = tower.module.code
        packs = code is not None and code.precision == "int8"
        sent.append(
            SentTensor(
                part=tower_name(t),
                dtype="uint8" if packs else "float32",
                columns=code.nbytes(width) if code is not None and packs else width,
                everywhere=tower.everywhere,
            )
        )
    return tuple(sent)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportManifest:
    """The content of `export.json`."""

    schema_version: int = EXPORT_SCHEMA
    """Layout of the export."""
    tool: Tool = field(default_factory=Tool)
    """What wrote the export."""
    format: ExportFormat
    """What kind of export it is."""
    bundle: ExportedBundle
    """The bundle that it was made of."""
    inputs: GraphInputs
    """What its graphs take."""
    columns: InputRecord | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Which columns of the data feed the bundle, if that is known."""
    out_of_range: OutOfRange = "refuse"
    """What becomes of ids outside their table."""
    gpu: bool = field(default=False, metadata=OMITTED_IF_EMPTY)
    """Whether it is meant for GPUs."""
    quantize: TableCode = "none"
    """How tables are stored."""
    parts: Mapping[str, str]
    """Part (`whole`, `tower_000`, ..., `over_arch`) -> its graph's file below the export."""
    towers: tuple[SentTensor, ...] = field(default=(), metadata=OMITTED_IF_EMPTY)
    """What the towers' graphs give; empty in exports of early versions: float32."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only one format has, such as the opset."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """What quantisation cost; empty if tables were not quantised."""
    checks: tuple[GraphCheck, ...] = ()
    """The checks that the export passed before it was put in place."""
    weights: Mapping[str, WeightsFile]
    """Weights file below the export -> its size and digests."""
    files: Mapping[str, FileDigest] = field(default_factory=dict, metadata=OMITTED_IF_EMPTY)
    """Every other file below the export -> its digest; empty in exports of early versions."""
    model: DmtSpec
    """The converted model that was exported."""
    digest: str = field(default="", metadata=OMITTED_IF_EMPTY)
    """Digest of all the rest of `export.json`; empty in exports of early versions."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<ExportManifest: {self.format}, {len(self.parts)} graphs>"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export.json`; `from_json` reads it back."""
        return to_json(self)

    def sealed(self) -> ExportManifest:
        """Return it with its own digest."""
        return replace(self, digest=digest_document(to_json(self)))

    @classmethod
    def from_json(cls, value: object) -> ExportManifest:
        """Read what `to_json` wrote.

        Raises:
            ExportError: A part is missing or damaged.
        """
        return from_json(cls, value, error=ExportError)


_MANIFEST: Final = Layout(
    content=ExportManifest,
    version=EXPORT_SCHEMA,
    error=ExportError,
    writer="dmt export",
    remedy="copy the export again, or export the bundle again",
)


def is_export(path: Path) -> bool:
    """Tell whether a path is an export's folder."""
    return (path / EXPORT_MANIFEST).is_file()


def read_export_manifest(folder: Path) -> ExportManifest:
    """Read an export's `export.json`.

    Raises:
        ExportError: It is missing, damaged, or has a newer schema version; or a file that it names
            is missing or has another size.
    """
    manifest = _MANIFEST.read(
        folder / EXPORT_MANIFEST,
        absent=ExportError(
            f"{folder} is not an export: it has no {EXPORT_MANIFEST}",
            expected="an export, as `dmt export` writes it",
            hint="export a bundle first: dmt export ckpt-dmt4 --format onnx --out served",
        ),
    )
    check_names(folder, manifest)
    return manifest
