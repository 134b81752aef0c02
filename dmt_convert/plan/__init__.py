"""Placing towers on hosts and tables on ranks. Importing this does not import torch."""

from dmt_convert.plan.cluster import GIB, HBM_RESERVE, Cluster, default_cluster
from dmt_convert.plan.packer import plan_towers
from dmt_convert.plan.placement import Shard, TablePlacement
from dmt_convert.plan.plan_check import check_plan
from dmt_convert.plan.tower_plan import TowerPlan
from dmt_convert.plan.traffic import CommunicationEstimate, Exchange, Traffic

__all__ = [
    "GIB",
    "HBM_RESERVE",
    "Cluster",
    "CommunicationEstimate",
    "Exchange",
    "Shard",
    "TablePlacement",
    "TowerPlan",
    "Traffic",
    "check_plan",
    "default_cluster",
    "plan_towers",
]
