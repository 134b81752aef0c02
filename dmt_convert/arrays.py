"""Names for the types of NumPy arrays: one spelling for the whole library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
"""Of any type."""
FloatArray = npt.NDArray[np.floating]
"""Of float32 or float64."""
Float32Array = npt.NDArray[np.float32]
"""What models and data sets hold."""
Float64Array = npt.NDArray[np.float64]
"""What closed forms and searches compute with."""
IntArray = npt.NDArray[np.int64]
"""Ids, offsets, row numbers."""
BoolArray = npt.NDArray[np.bool_]
"""Masks."""
