"""Inputs on which a flat model is looked at, with data or without."""

from dmt_convert.sampling.row_frequency import draw_rows
from dmt_convert.sampling.sample import (
    Sample,
    draw_sample,
    pool_batch,
    sample_size,
)

__all__ = [
    "Sample",
    "draw_rows",
    "draw_sample",
    "pool_batch",
    "sample_size",
]
