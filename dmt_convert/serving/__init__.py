"""What a server is given: exported graphs, how they are asked, and what runs them here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.serving.export_manifest import (
    EXPORT_FORMATS,
    EXPORT_MANIFEST,
    OVER_ARCH,
    TABLE_CODES,
    WHOLE,
    ExportFormat,
    ExportManifest,
    OutOfRange,
    TableCode,
    check_export_digests,
    is_export,
    read_export_manifest,
    tower_name,
)
from dmt_convert.serving.graph_inputs import (
    INPUT_FORMS,
    PADDING,
    FeatureInput,
    GraphInputs,
    InputForm,
)

if TYPE_CHECKING:
    from dmt_convert.serving.exported_model import ExportedModel, open_graph

_LAZY = ("ExportedModel", "open_graph")

__all__ = [
    "EXPORT_FORMATS",
    "EXPORT_MANIFEST",
    "INPUT_FORMS",
    "OVER_ARCH",
    "PADDING",
    "TABLE_CODES",
    "WHOLE",
    "ExportFormat",
    "ExportManifest",
    "ExportedModel",
    "FeatureInput",
    "GraphInputs",
    "InputForm",
    "OutOfRange",
    "TableCode",
    "check_export_digests",
    "is_export",
    "open_graph",
    "read_export_manifest",
    "tower_name",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dmt_convert.serving.exported_model"), name)
