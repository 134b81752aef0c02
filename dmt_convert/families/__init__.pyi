# What other folders use.
from .facts import Fact as Fact
from .families import ARCHITECTURES as ARCHITECTURES
from .findings import FlatModelInfo as FlatModelInfo
from .inference import infer_model as infer_model
from .inference import infer_spec as infer_spec
from .model_config import FeatureConfig as FeatureConfig
from .model_config import ModelConfig as ModelConfig
from .model_config import read_model_config as read_model_config
from .optimizer_state import read_initial_value as read_initial_value
from .optimizer_state import subtract_initial as subtract_initial
from .options import read_model_options as read_model_options
from .torchrec_dlrm import TORCHREC_DLRM as TORCHREC_DLRM
