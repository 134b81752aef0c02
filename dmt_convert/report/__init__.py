"""The page that a person decides by. Importing this imports neither torch nor matplotlib."""

from dmt_convert.report.partition_figure import write_partition_svg
from dmt_convert.report.report_data import ReportData
from dmt_convert.report.report_page import render_report
from dmt_convert.scoring import QualityRow

__all__ = [
    "QualityRow",
    "ReportData",
    "render_report",
    "write_partition_svg",
]
