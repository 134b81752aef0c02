"""Data sets: a registry of readers, and the adapter to a model's features."""

from dmt_convert.data.adapter import FeatureMatch, adapt_batches, match_features
from dmt_convert.data.batch import Bag, Batch, FloatArray, IntArray
from dmt_convert.data.dataset import DataReader, Dataset
from dmt_convert.data.dealt_batches import Share, adapt_shares, deal_batches
from dmt_convert.data.registry import READERS, open_data
from dmt_convert.data.row_range import take_range
from dmt_convert.data.row_selection import join_batches, take_rows, uniform_offsets

__all__ = [
    "READERS",
    "Bag",
    "Batch",
    "DataReader",
    "Dataset",
    "FeatureMatch",
    "FloatArray",
    "IntArray",
    "Share",
    "adapt_batches",
    "adapt_shares",
    "deal_batches",
    "join_batches",
    "match_features",
    "open_data",
    "take_range",
    "take_rows",
    "uniform_offsets",
]
