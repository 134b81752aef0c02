"""Placing towers on hosts and tables on ranks, and predicting steps there.

Importing this does not import torch.
"""

from dmt_convert.plan.assumptions import Assumptions
from dmt_convert.plan.cluster import GIB, HBM_RESERVE, Cluster, default_cluster
from dmt_convert.plan.collectives import Network
from dmt_convert.plan.cost_model import CommDtype, Machine, StepTime
from dmt_convert.plan.packer import plan_towers
from dmt_convert.plan.placement import Shard, TablePlacement
from dmt_convert.plan.plan_check import check_plan
from dmt_convert.plan.prediction import (
    PlacedStep,
    Prediction,
    describe_machine,
    predict_placement,
    predict_plan,
)
from dmt_convert.plan.presets import GPUS, Gpu, find_gpu
from dmt_convert.plan.scaling import ScalePoint, predict_scaling
from dmt_convert.plan.scaling_plot import plot_scaling
from dmt_convert.plan.suggestion import Candidate, Suggestion, suggest
from dmt_convert.plan.tower_plan import TowerPlan
from dmt_convert.plan.traffic import CommunicationEstimate, Exchange, Traffic

__all__ = [
    "GIB",
    "GPUS",
    "HBM_RESERVE",
    "Assumptions",
    "Candidate",
    "Cluster",
    "CommDtype",
    "CommunicationEstimate",
    "Exchange",
    "Gpu",
    "Machine",
    "Network",
    "PlacedStep",
    "Prediction",
    "ScalePoint",
    "Shard",
    "StepTime",
    "Suggestion",
    "TablePlacement",
    "TowerPlan",
    "Traffic",
    "check_plan",
    "default_cluster",
    "describe_machine",
    "find_gpu",
    "plan_towers",
    "plot_scaling",
    "predict_placement",
    "predict_plan",
    "predict_scaling",
    "suggest",
]
