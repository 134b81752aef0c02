"""`export.json`: what an export holds, how it is asked, and which model it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from dmt_convert import __version__
from dmt_convert.checkpoint import read_safetensors
from dmt_convert.errors import ExportError
from dmt_convert.files import digest_of, read_versioned
from dmt_convert.model import DmtSpec
from dmt_convert.serving.graph_inputs import GraphInputs

ExportFormat = Literal["onnx", "pt2", "triton"]
EXPORT_FORMATS: Final[tuple[str, ...]] = get_args(ExportFormat)
TableCode = Literal["none", "fp16", "int8", "int4"]
"""How tables are stored: as in the bundle, or quantised row by row."""
TABLE_CODES: Final[tuple[str, ...]] = get_args(TableCode)
OutOfRange = Literal["refuse", "clip"]
"""What becomes of an id outside its table: the graph fails, or takes the nearest row."""

EXPORT_MANIFEST: Final = "export.json"
EXPORT_SCHEMA: Final = 1
"""Raised when an export can no longer be read as before."""
WHOLE: Final = "whole"
OVER_ARCH: Final = "over_arch"


def tower_name(index: int) -> str:
    """Name of a tower's part, of its graph's output, and of its folder."""
    return f"tower_{index:03d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportManifest:
    """The content of `export.json`."""

    format: ExportFormat
    """What kind of export it is."""
    model: DmtSpec
    """The converted model that was exported."""
    inputs: GraphInputs
    """What its graphs take."""
    parts: Mapping[str, str]
    """Part (`whole`, `tower_000`, ..., `over_arch`) -> its graph's file below the export."""
    weights: Mapping[str, Mapping[str, Any]]
    """Weights file below the export -> {bytes, digests: {tensor: digest}}."""
    bundle: Mapping[str, Any]
    """name, tool_version, and source digest of the bundle that it was made of."""
    quantize: TableCode = "none"
    """How tables are stored."""
    out_of_range: OutOfRange = "refuse"
    """What becomes of ids outside their table."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only one format has, such as the opset."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """What quantisation cost, where there was any."""
    checks: tuple[Mapping[str, Any], ...] = ()
    """The checks that the export passed before it was put in place."""
    tool_version: str = __version__
    """Version of dmt-convert that wrote the export."""
    schema_version: int = EXPORT_SCHEMA
    """Layout of the export."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `export.json`; `from_json` reads it back."""
        return {
            "schema_version": self.schema_version,
            "tool": {"name": "dmt-convert", "version": self.tool_version},
            "format": self.format,
            "bundle": dict(self.bundle),
            "inputs": self.inputs.to_json(),
            "out_of_range": self.out_of_range,
            "quantize": self.quantize,
            "parts": dict(self.parts),
            "details": dict(self.details),
            "quality": dict(self.quality),
            "checks": [dict(check) for check in self.checks],
            "weights": {name: dict(entry) for name, entry in self.weights.items()},
            "model": self.model.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExportManifest:
        """Read what `to_json` wrote.

        Raises:
            KeyError: A part is missing; likewise TypeError, ValueError and AttributeError where
                it is of another kind than it should be.
        """
        for name, kind in (("parts", dict), ("weights", dict), ("bundle", dict)):
            if not isinstance(value[name], kind):
                raise TypeError(f"{name} is {type(value[name]).__name__}")
        if value["format"] not in EXPORT_FORMATS:
            raise ValueError(f"format {value['format']!r}")
        return cls(
            format=value["format"],
            model=DmtSpec.from_json(value["model"]),
            inputs=GraphInputs.from_json(value["inputs"]),
            parts=value["parts"],
            weights=value["weights"],
            bundle=value["bundle"],
            quantize=value["quantize"],
            out_of_range=value["out_of_range"],
            details=value["details"],
            quality=value["quality"],
            checks=tuple(value["checks"]),
            tool_version=value["tool"]["version"],
            schema_version=value["schema_version"],
        )


def is_export(path: Path) -> bool:
    """Tell whether a path is an export's folder."""
    return (path / EXPORT_MANIFEST).is_file()


def read_export_manifest(folder: Path) -> ExportManifest:
    """Read an export's `export.json`.

    Raises:
        ExportError: It is missing, damaged, or of another layout; or a file that it names is
            missing or of another size.
    """
    path = folder / EXPORT_MANIFEST
    manifest = read_versioned(
        path,
        ExportManifest.from_json,
        version=EXPORT_SCHEMA,
        absent=ExportError(
            f"{folder} is no export: it has no {EXPORT_MANIFEST}",
            expected="an export, as `dmt export` writes it",
            hint="export a bundle first: dmt export ckpt-dmt4 --format onnx --out served",
        ),
        damaged=lambda why: _damaged(path, why),
        other_version=lambda found: ExportError(
            f"{path} has schema version {found}",
            expected=f"schema version {EXPORT_SCHEMA}",
            hint="use the version of dmt-convert that wrote it, or export the bundle again",
        ),
    )
    _check_files(folder, manifest)
    return manifest


def check_export_digests(
    folder: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Read all weights of an export and compare their digests with its manifest.

    Raises:
        ExportError: Bytes changed since the export was written; every such tensor is named.
    """
    changed = []
    for file, entry in read_export_manifest(folder).weights.items():
        expected = entry["digests"]
        tensors = {t.name: t for t in read_safetensors(folder / file).tensors}
        for name in expected:
            if name not in tensors or digest_of(tensors[name], on_bytes) != expected[name]:
                changed.append(f"{file}: {name}")
    if changed:
        raise ExportError(
            f"the export {folder} changed on disk: {len(changed)} tensors have other bytes",
            expected="the digests in its export.json",
            hint="copy it again, or export the bundle again",
            details=changed,
        )


def _check_files(folder: Path, manifest: ExportManifest) -> None:
    details = [
        f"{name} is missing" for name in manifest.parts.values() if not _is_file(folder, name)
    ]
    for name, entry in manifest.weights.items():
        if not _is_file(folder, name):
            details.append(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) != entry["bytes"]:
            details.append(f"{name} has {size} bytes, expected {entry['bytes']}")
    if details:
        raise ExportError(
            f"the export {folder} is damaged",
            expected="the files that `dmt export` wrote, unchanged",
            hint="copy it again, or export the bundle again",
            details=details,
        )


def _is_file(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _damaged(path: Path, why: str) -> ExportError:
    return ExportError(
        f"{path} cannot be read ({why})",
        expected="the JSON that `dmt export` wrote",
        hint="copy the export again, or export the bundle again",
    )
