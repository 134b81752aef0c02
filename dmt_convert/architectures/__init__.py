"""Families of flat models: how tensor names and shapes become a `ModelSpec`."""

from dmt_convert.architectures.architecture import Architecture
from dmt_convert.architectures.families import ARCHITECTURES
from dmt_convert.architectures.findings import Fact, FlatModelInfo
from dmt_convert.architectures.inference import infer_model, infer_spec
from dmt_convert.architectures.model_config import FeatureConfig, ModelConfig, read_model_config
from dmt_convert.architectures.name_map import NameMap
from dmt_convert.architectures.optimizer_state import read_initial_value, subtract_initial

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Fact",
    "FeatureConfig",
    "FlatModelInfo",
    "ModelConfig",
    "NameMap",
    "infer_model",
    "infer_spec",
    "read_initial_value",
    "read_model_config",
    "subtract_initial",
]
