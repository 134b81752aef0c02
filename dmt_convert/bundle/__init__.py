"""The bundle: what every command reads and writes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.bundle.accumulators import (
    AccumulatorSource,
    accumulator_bytes,
    accumulator_file,
    describe_accumulators,
    plan_accumulator_files,
)
from dmt_convert.bundle.bundle import (
    PLAN_NAME,
    Bundle,
    Documents,
    Weights,
    check_digests,
    is_bundle,
    open_bundle,
    write_bundle,
)
from dmt_convert.bundle.checksums import check_checksums
from dmt_convert.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, read_manifest
from dmt_convert.bundle.staging import check_free, check_space, check_target, staged_folder
from dmt_convert.bundle.weights import SmallWeights, plan_table_files, table_bytes

if TYPE_CHECKING:
    from dmt_convert.bundle.bundle_model import open_bundle_model, split_state

_LAZY = {"open_bundle_model": "bundle_model", "split_state": "bundle_model"}

__all__ = [
    "MANIFEST_NAME",
    "PLAN_NAME",
    "SCHEMA_VERSION",
    "AccumulatorSource",
    "Bundle",
    "Documents",
    "Manifest",
    "SmallWeights",
    "Weights",
    "accumulator_bytes",
    "accumulator_file",
    "check_checksums",
    "check_digests",
    "check_free",
    "check_space",
    "check_target",
    "describe_accumulators",
    "is_bundle",
    "open_bundle",
    "open_bundle_model",
    "plan_accumulator_files",
    "plan_table_files",
    "read_manifest",
    "split_state",
    "staged_folder",
    "table_bytes",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
