# What other folders use.
from .dcp_reader import read_dcp as read_dcp
from .registry import open_checkpoint as open_checkpoint
from .safetensors_reader import DICTS_KEY as DICTS_KEY
from .safetensors_reader import DTYPE_NAMES as DTYPE_NAMES
from .safetensors_reader import read_safetensors as read_safetensors
from .trainer_folders import NVIDIA_TABLE_ORDER as NVIDIA_TABLE_ORDER
