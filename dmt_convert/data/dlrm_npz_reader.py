"""Reader of the processed npz of the facebookresearch DLRM trainer: `X_int`, `X_cat`, `y`.

The trainer's preprocessing sets negative integers to 0 before it writes the file, and its
collate function feeds log(X_int + 1) as float32 [facebookresearch/dlrm, `data_utils.py`,
`dlrm_data_pytorch.py`]; both are applied here. It stores ids as float64 whole numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from dmt_convert.data.array_blocks import ArrayBlocks, ArrayPart
from dmt_convert.data.row_blocks import BlockDataset
from dmt_convert.data.stored_arrays import npz_names, open_npz
from dmt_convert.data.value_checks import AnyArray

_NAMES: Final = frozenset({"X_int", "X_cat", "y"})


class DlrmNpzReader:
    """Reads `*_processed.npz` and `*_reordered.npz` (one file)."""

    format = "dlrm-npz"

    def can_read(self, path: Path) -> bool:
        """Tell by the names of the arrays."""
        return path.is_file() and npz_names(path) >= _NAMES

    def open(self, path: Path) -> BlockDataset:
        """Open the file, reading headers only.

        Raises:
            DataError: Arrays are damaged or do not fit each other.
        """
        arrays = open_npz(path)
        part = ArrayPart(
            dense=arrays["X_int"], ids=(arrays["X_cat"],), is_matrix=True, labels=arrays["y"]
        )
        source = ArrayBlocks(
            parts=(part,),
            feature_names=tuple(f"f{i}" for i in range(part.num_features)),
            dense_names=tuple(f"X_int[{i}]" for i in range(part.num_dense)),
            transform=log1p_dense,
        )
        return BlockDataset(
            path=path,
            format=self.format,
            num_dense=part.num_dense,
            feature_names=source.feature_names,
            names_are_positional=True,
            has_labels=True,
            source=source,
        )


def log1p_dense(values: AnyArray) -> AnyArray:
    """Return log(max(x, 0) + 1) in float32, as the DLRM trainer computes it."""
    raw = values.astype(np.float32)
    return np.log(np.maximum(raw, np.float32(0)) + np.float32(1))
