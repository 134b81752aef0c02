# What other folders use.
from .affinity import cosine_affinity as cosine_affinity
from .affinity import tells_pairs as tells_pairs
from .config import PartitionConfig as PartitionConfig
from .config import needs_affinity as needs_affinity
from .model_affinity import measure_affinity as measure_affinity
from .partitioner import Partition as Partition
from .partitioner import TowerLoad as TowerLoad
from .partitioner import measure_loads as measure_loads
from .partitioner import partition_features as partition_features
from .plot import figure_svg as figure_svg
from .plot import plot_partition as plot_partition
