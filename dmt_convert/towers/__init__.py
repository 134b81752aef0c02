"""The converted model: towers, their modules, and how they start from the flat model's weights.

Specs are plain data; everything that needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.towers.dmt_spec import (
    DmtSpec,
    TowerModuleKind,
    TowerModuleSpec,
    TowerSpec,
)
from dmt_convert.towers.module_choice import (
    alternative_modules,
    converted_spec,
    module_spec,
)

if TYPE_CHECKING:
    from dmt_convert.towers.dmt_model import DmtModel, Tower
    from dmt_convert.towers.flat_model import FlatModel, load_dense, open_flat_model
    from dmt_convert.towers.table_lookup import MappedTables, TrainableTables

_LAZY = {
    "DmtModel": "dmt_model",
    "FlatModel": "flat_model",
    "MappedTables": "table_lookup",
    "Tower": "dmt_model",
    "TrainableTables": "table_lookup",
    "load_dense": "flat_model",
    "open_flat_model": "flat_model",
}

__all__ = [
    "DmtModel",
    "DmtSpec",
    "FlatModel",
    "MappedTables",
    "Tower",
    "TowerModuleKind",
    "TowerModuleSpec",
    "TowerSpec",
    "TrainableTables",
    "alternative_modules",
    "converted_spec",
    "load_dense",
    "module_spec",
    "open_flat_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
