"""What the logit feels of sampled rows: the material of a partition by loss."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from dmt_convert.conversion.initialisation import trace_flat
from dmt_convert.conversion.partition import Felt
from dmt_convert.conversion.sample import Sample
from dmt_convert.conversion.start import HELD_OUT, check_logits
from dmt_convert.families import FlatModelInfo
from dmt_convert.model import open_flat_model

_ELEMENTS: Final = 1 << 25
"""Elements of all rows: 128 MiB of embeddings, and as much of gradients."""
_MIN_ROWS: Final = 256
_MAX_ROWS: Final = 1024
"""More rows take longer; on Criteo and MovieLens the loss on rows that were not read is within some
per cent of that on these."""


def measure_felt(info: FlatModelInfo, sample: Sample) -> Felt:
    """Run a flat model on sampled rows, and keep the logit's gradient by their embeddings.

    Args:
        info: The flat model.
        sample: Rows; those that a conversion holds out are not used.

    Raises:
        CheckpointError: Its logits are not finite.
    """
    model = open_flat_model(info)
    fit, _ = sample.split(HELD_OUT)
    rows = int(np.clip(_ELEMENTS // sum(info.spec.feature_dims), _MIN_ROWS, _MAX_ROWS))
    fit = fit.first(rows)
    check_logits(model, fit)
    with torch.no_grad():
        trace = trace_flat(model, fit)
    return Felt(
        pooled=trace.pooled,
        gradient=trace.pooled_gradient,
        dims=info.spec.feature_dims,
        joint=sample.source == "calibration",
        spread=float(trace.logits.var(dtype=np.float64)),
    )
