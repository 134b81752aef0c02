# What other folders use.
from .documents import describe_bundle as describe_bundle
from .documents import describe_conversion as describe_conversion
from .documents import describe_manifest as describe_manifest
from .documents import describe_partition as describe_partition
from .partition_figure import write_partition_svg as write_partition_svg
from .report_data import ReportData as ReportData
from .report_page import render_report as render_report
