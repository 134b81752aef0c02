"""The report as one page: no script, nothing that is loaded from elsewhere."""

from __future__ import annotations

from typing import Final

from dmt_convert.report.finetune_section import render_finetune
from dmt_convert.report.headline_section import render_headline
from dmt_convert.report.markup import Html, escape, join, tag
from dmt_convert.report.partition_section import render_partition
from dmt_convert.report.plan_section import render_plan
from dmt_convert.report.provenance_section import (
    render_commands,
    render_facts,
    render_files,
    render_initialisation,
)
from dmt_convert.report.quality_section import render_quality
from dmt_convert.report.report_data import ReportData
from dmt_convert.report.style_sheet import STYLE
from dmt_convert.report.tower_section import render_towers

_SECTIONS: Final = (
    ("quality", "Quality", render_quality),
    ("finetune", "Fine-tuning", render_finetune),
    ("towers", "Towers", render_towers),
    ("partition", "Partition", render_partition),
    ("plan", "Plan", render_plan),
    ("facts", "Facts", render_facts),
    ("initialisation", "Initialisation", render_initialisation),
    ("files", "Files", render_files),
    ("next", "Next commands", render_commands),
)
"""Anchor, name in the contents, and what draws it, in the order in which one asks."""

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Should a name out of a checkpoint ever get past the escaping, it still loads nothing."""


def render_report(data: ReportData) -> str:
    """Return the report as one HTML5 document; the same data gives the same text.

    Args:
        data: What it says.
    """
    sections = [(anchor, name, render(data)) for anchor, name, render in _SECTIONS]
    shown = [entry for entry in sections if entry[2]]
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", escape(f"{data.title}: dmt-convert report")),
            tag("style", Html(STYLE)),
        ]
    )
    contents = tag(
        "nav",
        tag(
            "ul",
            join(tag("li", tag("a", escape(name), href=f"#{a}")) for a, name, _ in shown),
        ),
        aria_label="Contents",
    )
    body = tag(
        "body",
        render_headline(data),
        contents,
        tag("main", join(content for _, _, content in shown)),
        tag("footer", escape(f"Written by dmt-convert {data.tool_version}. Loads nothing.")),
    )
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", head)}{body}</html>\n'
