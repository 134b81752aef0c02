"""Real data sets, read from public files that a user has fetched; the project ships none of them.

    python -m benchmarks.data_sets frappe --raw RAW --out data/frappe

`RAW` holds the files that `--list` names; it defaults to the folder `DMT_DATA_SETS`/NAME. The
folder that is written is what `benchmarks/flat_models.py` and `dmt convert --calibration` read:
`train.npz`, `valid.npz`, `test.npz` and `schema.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .amazon_access import AMAZON_ACCESS
from .frappe import FRAPPE
from .movielens100k import MOVIELENS_100K
from .prepared import DataSet, Examples, RawDataError, prepare

__all__ = ["DATA_SETS", "DataSet", "Examples", "RawDataError", "prepare"]

DATA_SETS: Final[Mapping[str, DataSet]] = {
    each.name: each for each in (FRAPPE, AMAZON_ACCESS, MOVIELENS_100K)
}
"""Name -> how a data set is read."""
