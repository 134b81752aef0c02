"""The ranges of int8 codes, from what towers emit on sampled rows.

Letters: n rows, M width of all pooled embeddings, O elements that a tower emits.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import torch
from torch import Tensor

from dmt_convert.arrays import Float32Array
from dmt_convert.conversion.blocks import row_blocks
from dmt_convert.model import Code, CodedModule, DmtModel, to_tensor
from dmt_convert.model.tower_code import FULL_LEVELS, HALF_LEVELS

_ROWS: Final = 4096
_MARGIN: Final = 0.05
"""Elements of 8 bits: room on either side for rows that the sample lacks, and for training."""
_CLIPPED: Final = (0.0, 5e-4, 2e-3, 1e-2, 3e-2)
"""Elements of 4 bits: shares of the rows that may be clipped on either side."""


def fit_codes(model: DmtModel, pooled: Float32Array) -> None:
    """Give every int8 code of a model its ranges, in place.

    Elements of 8 bits span what the sample spans, and a margin. Elements of 4 bits take the range,
    among 25, whose mean squared error is least.

    Args:
        model: The model, its tower modules as they will be.
        pooled: Pooled embeddings of sampled rows in flat order, shape (n, M).
    """
    columns = model.spec.columns_by_tower
    for tower, own in zip(model.tower_list, columns, strict=True):
        module = tower.tower_module
        if not isinstance(module, CodedModule) or module.code is None:
            continue
        code, index = module.code, torch.tensor(own)
        if code.spec.precision != "int8":
            continue
        parts = []
        for rows in row_blocks(model.spec.flat, min(_ROWS, len(pooled))):
            with torch.no_grad():
                parts.append(module.emit(to_tensor(pooled[rows])[:, index]))
        _set_ranges(code, torch.cat(parts))


def _set_ranges(code: Code, emitted_nO: Tensor) -> None:
    whole = code.width - code.spec.int4
    low, high = emitted_nO.amin(dim=0), emitted_nO.amax(dim=0)
    margin = _MARGIN * (high - low)
    low, high = low - margin, high + margin
    if code.spec.int4:
        low[whole:], high[whole:] = _best_ranges(emitted_nO[:, whole:])
    levels = torch.full_like(low, FULL_LEVELS - 1)
    levels[whole:] = HALF_LEVELS - 1
    # an element that never varies is level 0, exactly
    smallest = 1e-6 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-6)
    code.low.copy_(low)
    code.step.copy_(torch.maximum(high - low, smallest) / levels)


def _best_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest level of every element, 16 in all."""
    ordered = values.sort(dim=0).values
    last = len(ordered) - 1
    best_error = torch.full(values.shape[1:], torch.inf)
    best = ordered[0].clone(), ordered[-1].clone()
    for left, right in product(_CLIPPED, _CLIPPED):
        low, high = ordered[round(left * last)], ordered[round((1 - right) * last)]
        step = (high - low).clamp(min=1e-12) / (HALF_LEVELS - 1)
        rounded = low + step * ((values - low) / step).round().clamp(0, HALF_LEVELS - 1)
        error = (rounded - values).square().mean(dim=0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, low, best[0]), torch.where(better, high, best[1])
    return best
