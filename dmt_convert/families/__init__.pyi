# What other folders use, and what packages that add a family use.
from .dlrm import DlrmFamily as DlrmFamily
from .family import Family as Family
from .model_config import FeatureConfig as FeatureConfig
from .model_config import ModelConfig as ModelConfig
from .model_config import read_model_config as read_model_config
from .model_info import Fact as Fact
from .model_info import FlatModelInfo as FlatModelInfo
from .model_info import read_initial_value as read_initial_value
from .model_info import subtract_initial as subtract_initial
from .name_map import NameMap as NameMap
from .options import read_model_options as read_model_options
from .registry import FAMILIES as FAMILIES
from .registry import infer_model as infer_model
from .registry import infer_spec as infer_spec
from .registry import list_families as list_families
from .torchrec import TORCHREC_DLRM as TORCHREC_DLRM
from .trainer_tensors import TrainerTensors as TrainerTensors
