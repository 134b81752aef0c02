"""Tower Partitioner: which features form which tower."""

from dmt_convert.partition.affinity import cosine_affinity, weights_affinity
from dmt_convert.partition.config import PartitionConfig, needs_affinity
from dmt_convert.partition.model_affinity import measure_affinity
from dmt_convert.partition.partitioner import (
    Partition,
    TowerLoad,
    measure_loads,
    partition_features,
)
from dmt_convert.partition.plot import figure_svg, plot_partition

__all__ = [
    "Partition",
    "PartitionConfig",
    "TowerLoad",
    "cosine_affinity",
    "figure_svg",
    "measure_affinity",
    "measure_loads",
    "needs_affinity",
    "partition_features",
    "plot_partition",
    "weights_affinity",
]
