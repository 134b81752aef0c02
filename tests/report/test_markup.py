"""Escaping: text stays text, whatever it is."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.report.markup import EMPTY, bar, escape, table, tag


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str | None] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.values += [value for _, value in attributes]

    def handle_data(self, data: str) -> None:
        self.words += data


@settings(derandomize=True, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))))
def test_visible_text_comes_back(text):
    read = Reader(tag("b", escape(text), title=text))
    assert (read.tags, read.values, read.words) == (["b"], [text], text)


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_any_text_is_one_element_that_utf8_can_hold(text):
    page = tag("b", escape(text), title=text)
    page.encode("utf-8")
    assert Reader(page).tags == ["b"]


def test_what_cannot_be_seen_is_spelled_out():
    assert escape("a\x00\u202e\n\ud800") == "a\\u0000\\u202e\\n\\ud800"


def test_without_escaping_the_reader_would_see_it():
    assert Reader("<b><i></b>").tags != ["b"]


def test_bars_stay_in_their_track():
    assert "width:100.0%" in bar(7.0) and "width:0.0%" in bar(-1.0)


def test_cells_carry_their_heading():
    shown = table("c<", ["A", "B<"], [[escape("x"), EMPTY]], numeric=[1])
    assert 'data-label="B&lt;"' in shown and "<caption>c&lt;</caption>" in shown
    assert shown.count('class="number"') == 2
