# What other folders use.
from .captured import Captured as Captured
from .captured import FeaturePlan as FeaturePlan
from .captured import TablePart as TablePart
from .captured_network import CapturedNetwork as CapturedNetwork
from .flow import capture_module as capture_module
from .graph import CAPTURED as CAPTURED
from .graph import CapturedGraph as CapturedGraph
from .graph import read_graph as read_graph
