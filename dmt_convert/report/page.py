"""The report as one HTML page, with the figure of the partition beside it.

Jinja escapes every value that the template prints. Before that, characters that cannot be seen, or
that would turn the text around them, are spelled out: names come out of files of any origin.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from markupsafe import Markup

from dmt_convert.arrays import FloatArray
from dmt_convert.report import quantities
from dmt_convert.report.figures import figure_svg
from dmt_convert.report.view import ReportView

if TYPE_CHECKING:
    from jinja2 import Environment

    from dmt_convert.bundle import Manifest
    from dmt_convert.placement import TowerPlan

REPORT_NAME: Final = "report.html"
FIGURE_NAME: Final = "partition.svg"

_FOLDER: Final = Path(__file__).parent
_UNSEEN: Final = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of characters that cannot be seen, or that turn the text around them."""
_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that HTML does not allow in text, or that turn the text around them."""
_PREFIX: Final = "partition-"

Item = TypeVar("Item")


def render_documents(
    manifest: Manifest,
    plan: TowerPlan,
    out: Path,
    *,
    figure: str | None = None,
    affinity: FloatArray | None = None,
) -> Mapping[str, str]:
    """Return the report and the figure of a bundle, by file name.

    Args:
        manifest: The bundle's manifest, sizes and digests of its weights included.
        plan: Where the towers go.
        out: The bundle's folder, for the commands to copy.
        figure: The partition as an `<svg>` element, as it was drawn before; None draws it.
        affinity: Affinity of features to draw, in model order, shape (F, F); it is not part of
            the manifest.
    """
    towers, record = manifest.model.assignment.towers, manifest.partition
    shows_affinity = affinity is not None or (figure is not None and record.affinity is not None)
    if figure is None:
        figure = figure_svg(manifest.model.flat, towers, record, affinity)
    view = ReportView(
        manifest=manifest,
        plan=plan,
        folder=out.name,
        figure=figure,
        shows_affinity=shows_affinity,
    )
    return {REPORT_NAME: render_page(view), FIGURE_NAME: figure}


def render_page(view: ReportView) -> str:
    """Return the report as one HTML5 document; the same view gives the same text."""
    return _environment().get_template("report.html.j2").render(view=view)


def render_text(template: str, **values: object) -> str:
    """Fill in a text with the rules of the page: escaped, and visible."""
    return _environment().from_string(template).render(**values)


def spell_out(text: str) -> str:
    r"""Replace characters that cannot be seen by their names: `\n`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        _SHORT.get(character, f"\\u{ord(character):04x}")
        if unicodedata.category(character) in _UNSEEN
        else character
        for character in text
    )


_SHORT: Final = {"\n": "\\n", "\t": "\\t"}


def isolate(text: str) -> Markup:
    """Return a name out of a file in an element that keeps its direction of writing its own."""
    return Markup('<bdi class="name">{}</bdi>').format(spell_out(text))


def embed_figure(
    figure: str, description: str, title: str = "The partition", prefix: str = _PREFIX
) -> Markup:
    """Make an `<svg>` element fit for an HTML page.

    Ids that something refers to get a prefix, others are left out. Namespaces, metadata and
    comments, which only a file needs, are left out too, and so is the style sheet, which would
    apply to the whole page.

    Args:
        figure: The element.
        description: What it shows, for readers who cannot see it.
        title: Its name.
        prefix: Begins all ids, which no other figure of the page may use.
    """
    svg = _FORBIDDEN.sub("\ufffd", figure)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style\b.*?</style>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))

    def rename(found: re.Match[str]) -> str:
        tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", found[0])
        return re.sub(
            r'\sid="([^"]*)"',
            lambda name: f' id="{prefix}{name[1]}"' if name[1] in used else "",
            tag,
        )

    svg = re.sub(r"<[^>]*>", rename, svg)
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    head = Markup(
        '<svg {box} role="img" aria-labelledby="{prefix}title {prefix}description" '
        'stroke-linejoin="round" stroke-linecap="butt">'
        '<title id="{prefix}title">{title}</title>'
        '<desc id="{prefix}description">{description}</desc>'
    )
    return head.format(
        box=Markup(view_box.group()) if view_box else "",
        prefix=prefix,
        title=title,
        description=spell_out(description),
    ) + Markup(rest)


def cut_list(items: Sequence[Item], limit: int | None) -> list[Sequence[Item]]:
    """Return the first `limit` items, and the others, if there are any."""
    if limit is None or len(items) <= limit:
        return [items]
    return [items[:limit], items[limit:]]


def show_width(share: float) -> str:
    """Return the width of a bar that is filled to a share in [0, 1]."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "name": isolate,
        "figure": embed_figure,
        "cut": cut_list,
        "width": show_width,
        "bytes": quantities.show_bytes,
        "number": quantities.show_number,
        "factor": quantities.show_factor,
        "agreement": quantities.show_agreement,
        "small": quantities.show_small,
        "metric": quantities.show_metric,
        "plural": quantities.plural,
    }
    environment.globals["style"] = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
    return environment


def _finalize(value: Any) -> Any:
    """Prepare what the template prints; what is not markup is escaped after this."""
    return value if isinstance(value, Markup) else spell_out(str(value))
