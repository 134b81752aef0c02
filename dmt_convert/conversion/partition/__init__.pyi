# What other folders use.
from .affinity import cosine_affinity as cosine_affinity
from .affinity import measure_affinity as measure_affinity
from .affinity import tells_pairs as tells_pairs
from .joint_code import Felt as Felt
from .joint_code import JointCodes as JointCodes
from .partitioner import Partition as Partition
from .partitioner import TowerLoad as TowerLoad
from .partitioner import measure_loads as measure_loads
from .partitioner import needs_affinity as needs_affinity
from .partitioner import partition_features as partition_features
from .units import build_units as build_units
