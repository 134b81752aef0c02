"""Fine-tuning: train a converted model further, and write it as a new bundle.

What needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.finetune.finetune_config import FinetuneConfig, merge_settings, read_settings

if TYPE_CHECKING:
    from dmt_convert.finetune.finetuned_bundle import write_finetuned
    from dmt_convert.finetune.loading import check_memory, load_bundle, load_tables
    from dmt_convert.finetune.loop import Evaluation, TrainResult, run_loop
    from dmt_convert.finetune.trainable_model import TrainableModel, make_trainable
    from dmt_convert.finetune.training import measure_rows, train
    from dmt_convert.finetune.training_data import TrainingData, open_training_data

_LAZY = {
    "Evaluation": "loop",
    "TrainResult": "loop",
    "TrainableModel": "trainable_model",
    "TrainingData": "training_data",
    "check_memory": "loading",
    "load_bundle": "loading",
    "load_tables": "loading",
    "make_trainable": "trainable_model",
    "measure_rows": "training",
    "open_training_data": "training_data",
    "run_loop": "loop",
    "train": "training",
    "write_finetuned": "finetuned_bundle",
}

__all__ = [
    "Evaluation",
    "FinetuneConfig",
    "TrainResult",
    "TrainableModel",
    "TrainingData",
    "check_memory",
    "load_bundle",
    "load_tables",
    "make_trainable",
    "measure_rows",
    "merge_settings",
    "open_training_data",
    "read_settings",
    "run_loop",
    "train",
    "write_finetuned",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
