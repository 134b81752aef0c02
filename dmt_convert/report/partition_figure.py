"""The partition as a picture: a file of its own, or inside the report.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from dmt_convert.conversion.partition import Partition, figure_svg, plot_partition
from dmt_convert.report.markup import Html, escape, tag
from dmt_convert.spec import ModelSpec

_PREFIX: Final = "partition-"
_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What HTML does not allow in text, and what turns the text around it."""


def write_partition_svg(spec: ModelSpec, partition: Partition, path: Path) -> None:
    """Draw a partition into a .svg file.

    Raises:
        PartitionError: The name ends in neither .svg nor .png.
    """
    plot_partition(spec, partition, path)


def embed_figure(
    spec: ModelSpec, partition: Partition, *, description: str, drawn: str | None = None
) -> Html:
    """Draw a partition as an `<svg>` element for an HTML page.

    Ids get a prefix of their own; what only a file needs (namespaces, metadata, comments) and
    the style sheet, which would reach the rest of the page, are left out.

    Args:
        spec: The flat model.
        partition: The towers.
        description: What the picture shows, for those who do not see it.
        drawn: The picture, where there is one already.
    """
    svg = _FORBIDDEN.sub("\ufffd", figure_svg(spec, partition) if drawn is None else drawn)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style\b.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{_PREFIX}', svg)
    svg = re.sub(r'href="#', f'href="#{_PREFIX}', svg)
    svg = re.sub(r"url\(#", f"url(#{_PREFIX}", svg)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None
    title, text = f"{_PREFIX}title", f"{_PREFIX}description"
    head = (
        f'<svg {view_box.group()} role="img" aria-labelledby="{title} {text}" '
        'stroke-linejoin="round" stroke-linecap="butt">'
    )
    names = tag("title", escape("The partition"), id=title) + tag(
        "desc", escape(description), id=text
    )
    return Html(head + names + rest)
