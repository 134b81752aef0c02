"""Exports: graphs for servers, one per tower and one over them, from one copy of the weights."""

from dmt_convert.export.export_config import ExportConfig, plan_inputs
from dmt_convert.export.exporter import Export, export_bundle
from dmt_convert.export.graph_checks import GraphCheck

__all__ = ["Export", "ExportConfig", "GraphCheck", "export_bundle", "plan_inputs"]
