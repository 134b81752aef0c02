"""Pieces of HTML. `Html` is markup that is safe; a `str` is text that anyone may have written.

Every function here escapes the `str` it is given and passes `Html` on, so that a name out of a
checkpoint cannot become markup.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final, NewType

Html = NewType("Html", str)

EMPTY: Final = Html("")
_UNSEEN: Final = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of what cannot be seen, or turns the text around it."""


def escape(text: str) -> Html:
    """Escape text; characters that cannot be seen are spelled out."""
    shown = "".join(
        character if unicodedata.category(character) not in _UNSEEN else _spell(character)
        for character in text
    )
    return Html(html.escape(shown, quote=True))


def join(parts: Iterable[Html], separator: Html = EMPTY) -> Html:
    """Put pieces one after another."""
    return Html(separator.join(parts))


def tag(name: str, *content: Html, **attributes: str | None) -> Html:
    """An element.

    Args:
        name: Element name.
        content: What is inside.
        attributes: Attributes, escaped here; `class_` is class, an underscore a hyphen; None
            leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{''.join(content)}</{name}>")


def name_of(text: str) -> Html:
    """A name out of a file: isolated, so that its direction of writing stays its own."""
    return tag("bdi", escape(text), class_="name")


def paragraph(*content: Html, class_: str | None = None) -> Html:
    """A paragraph."""
    return tag("p", *content, class_=class_)


def code(text: str) -> Html:
    """Something to type."""
    return tag("code", escape(text))


def section(anchor: str, heading: str, *content: Html) -> Html:
    """A section of the page, with its heading."""
    title = tag("h2", escape(heading), id=f"{anchor}-heading")
    return tag("section", title, *content, id=anchor, aria_labelledby=f"{anchor}-heading")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Html]],
    *,
    numeric: Sequence[int] = (),
    class_: str = "",
) -> Html:
    """A table whose first column heads its rows; on narrow screens every row becomes a card.

    Args:
        caption: What it shows.
        columns: Headings.
        rows: Cells, as many as there are headings.
        numeric: Indices of columns of numbers.
        class_: Further classes.
    """
    kinds = ["number" if k in numeric else None for k in range(len(columns))]
    head = join(
        tag("th", escape(column), scope="col", class_=kind)
        for column, kind in zip(columns, kinds, strict=True)
    )
    body = join(tag("tr", _cells(columns, kinds, cells)) for cells in rows)
    inside = tag(
        "table",
        tag("caption", escape(caption)),
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_=class_ or None,
    )
    return tag("div", inside, class_="scroll")


def _cells(columns: Sequence[str], kinds: Sequence[str | None], cells: Sequence[Html]) -> Html:
    first = tag("th", cells[0], scope="row", data_label=columns[0], class_=kinds[0])
    rest = [
        tag("td", tag("div", cell), data_label=column, class_=kind)
        for column, kind, cell in zip(columns[1:], kinds[1:], cells[1:], strict=True)
    ]
    return join([first, *rest])


def bar(share: float, *, colour: str | None = None, kind: str = "") -> Html:
    """A bar that is filled to a share in [0, 1]; the number stands beside it as text."""
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    style = f"width:{width}" + (f";background:{colour}" if colour else "")
    return tag("span", tag("span", style=style), class_=f"bar {kind}".rstrip(), aria_hidden="true")


def details(summary: str, *content: Html) -> Html:
    """Something that is opened on demand."""
    return tag("details", tag("summary", escape(summary)), *content)


def definitions(pairs: Iterable[tuple[str, Html]]) -> Html:
    """A list of terms and what they stand for."""
    rows = (tag("div", tag("dt", escape(term)), tag("dd", value)) for term, value in pairs)
    return tag("dl", join(rows))


def _spell(character: str) -> str:
    if character in "\n\t":
        return "\\n" if character == "\n" else "\\t"
    return f"\\u{ord(character):04x}"
