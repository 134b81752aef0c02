"""A batch of rows: dense inputs and bags of ids, as numpy arrays.

Letters: B batch, D dense inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """The ids of one feature for a whole batch, in the CSR form of `nn.EmbeddingBag`."""

    values: IntArray
    """Ids of all rows one after the other, shape (nnz,), int64."""
    offsets: IntArray
    """Where every row's ids begin, then nnz: shape (B + 1,), int64."""
    weights: FloatArray | None = None
    """One weight per id, shape (nnz,), float32, or None for unweighted bags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of input."""

    dense: FloatArray
    """Dense inputs as fed to the model, shape (B, D), float32; D may be 0."""
    feature_names: tuple[str, ...]
    """Names of the bags."""
    bags: tuple[Bag, ...]
    """One per feature, in the order of `feature_names`."""
    labels: FloatArray | None = None
    """0 or 1 per row, shape (B,), float32, where known."""
    logits: FloatArray | None = None
    """The original model's logits, shape (B,), float32, where the data holds them (probes)."""

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense)
