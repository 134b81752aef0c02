"""Score models on data, and measure what the scores are worth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.scoring.metrics import Accuracy, Agreement, measure_accuracy, measure_agreement
from dmt_convert.scoring.quality_table import Quality, QualityRow

if TYPE_CHECKING:
    from dmt_convert.scoring.scored_model import ScoredModel, Scores, open_model, score_data

_LAZY = ("ScoredModel", "Scores", "open_model", "score_data")

__all__ = [
    "Accuracy",
    "Agreement",
    "Quality",
    "QualityRow",
    "ScoredModel",
    "Scores",
    "measure_accuracy",
    "measure_agreement",
    "open_model",
    "score_data",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.scored_model"), name)
