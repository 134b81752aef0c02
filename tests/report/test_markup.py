"""Escaping: text stays text, whatever it is."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.report.page import render_page, render_text, show_width, spell_out
from support.reports import build_view

ELEMENT = '<b title="{{ text }}">{{ text }}</b>'


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
    read = Reader(render_text(ELEMENT, text=text))
    assert (read.tags, read.values, read.words) == (["b"], [text], text)


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_any_text_is_one_element_that_utf8_can_hold(text):
    page = render_text(ELEMENT, text=text)
    page.encode("utf-8")
    assert Reader(page).tags == ["b"]


def test_what_cannot_be_seen_is_spelled_out():
    shown = "a\\u0000\\u202e\\n\\ud800"
    assert spell_out("a\x00\u202e\n\ud800") == shown
    assert render_text("{{ text }}", text="a\x00\u202e\n\ud800") == shown


def test_names_keep_their_direction_of_writing_to_themselves():
    found = render_text("{{ text|name }}", text="<i>\u202e")
    assert found == '<bdi class="name">&lt;i&gt;\\u202e</bdi>'


def test_without_escaping_the_reader_would_see_it():
    assert Reader("<b><i></b>").tags != ["b"]


def test_bars_stay_in_their_track():
    assert show_width(7.0) == "100.0%" and show_width(-1.0) == "0.0%"


def test_cells_carry_their_heading():
    page = render_page(build_view())
    hosts = page[page.index('<table class="hosts">') :].split("</table>")[0]
    assert 'data-label="Of the host&#39;s memory"' in hosts
    assert "<caption>Towers and bytes of every host: tables with" in hosts
    assert hosts.count('class="number"') == 1 + 2  # the heading, and a cell of each host
