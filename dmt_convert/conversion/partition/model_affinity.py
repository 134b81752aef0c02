"""The affinity of a checkpoint's features, from a sample of its inputs.

Letters: n sampled rows, F features.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import check_finite, read_tensor
from dmt_convert.conversion import Sample
from dmt_convert.conversion.partition.affinity import cosine_affinity, weights_affinity
from dmt_convert.conversion.partition.config import AffinityKind
from dmt_convert.families import FlatModelInfo

_MAX_ROWS: Final = 1024
_MIN_ROWS: Final = 64
_PAIR_BUDGET: Final = 1 << 31


def measure_affinity(
    info: FlatModelInfo, sample: Sample, kind: AffinityKind
) -> npt.NDArray[np.float32]:
    """Measure how much the features of a checkpoint belong together.

    Args:
        info: The flat model.
        sample: Rows with their pooled embeddings; at most 1,024 are used, fewer for thousands
            of features (the cost grows with n F^2).
        kind: cosine or weights, see DESIGN section 2.

    Returns:
        Affinity in [0, 1], symmetric, shape (F, F).

    Raises:
        CheckpointError: A weight that is looked at is NaN or Inf.
    """
    count = len(info.spec.features)
    rows = int(np.clip(_PAIR_BUDGET // count**2, _MIN_ROWS, _MAX_ROWS))
    pooled = [vectors[:rows] for vectors in sample.per_feature(info.spec)]
    if kind == "cosine":
        affinity: npt.NDArray[np.float32] = cosine_affinity(pooled)
        return affinity
    weights = {}
    for name, tensor in info.dense_tensors.items():
        array = read_tensor(tensor)
        check_finite(array, tensor.path)
        weights[name] = np.asarray(array, dtype=np.float32)
    used: npt.NDArray[np.float32] = weights_affinity(info.spec, weights, pooled)
    return used
