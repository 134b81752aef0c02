# What other folders use.
from .layer_graph import LayerGraph as LayerGraph
from .registry import build_network as build_network
