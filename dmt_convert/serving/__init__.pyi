# What other folders use.
from .checks import generate_batch as generate_batch
from .export_config import plan_inputs as plan_inputs
from .export_manifest import OVER_ARCH as OVER_ARCH
from .export_manifest import WHOLE as WHOLE
from .export_manifest import ExportManifest as ExportManifest
from .export_manifest import is_export as is_export
from .export_manifest import read_export_manifest as read_export_manifest
from .export_manifest import tower_name as tower_name
from .exported_model import ExportedModel as ExportedModel
from .exported_model import open_graph as open_graph
from .exporter import Export as Export
from .exporter import export_bundle as export_bundle
from .graph_inputs import PADDING as PADDING
from .graph_inputs import FeatureInput as FeatureInput
from .graph_inputs import GraphInputs as GraphInputs
from .graph_inputs import join_inputs as join_inputs
