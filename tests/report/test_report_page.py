"""The page: well formed, self-contained, complete, and safe against names out of files."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from dmt_convert.documents import QualityRow
from dmt_convert.families import Fact
from dmt_convert.report import partition_section, render_report
from dmt_convert.report.markup import EMPTY
from support.reports import build_data

VOID = {"meta", "br", "img", "link", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><b>",
    "' onload='x",
    "&lt;not escaped twice&gt;",
    "-->",
    "a\nb\x01\u202ec",
)


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes a second, and some tests do not look at it."""
    monkeypatch.setattr(partition_section, "embed_figure", lambda *_, **__: EMPTY)


class Page(HTMLParser):
    """What a page holds, and what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {name}" for name in self.open]
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.problems += sorted({f"id twice: {name}" for name in ids if ids.count(name) > 1})
        self.problems += self._loads()
        self.ids = set(ids)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open[-1] != name:
            self.problems.append(f"</{name}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def _loads(self) -> list[str]:
        """What a browser would fetch, run, or look up in vain."""
        found = [f"<{n}>" for n, _ in self.tags if n in ("script", "link", "iframe", "img")]
        for name, attributes in self.tags:
            for key, value in attributes.items():
                text = value or ""
                if key in ("src", "href", "xlink:href") and not text.startswith(("#", "data:")):
                    found.append(f"<{name} {key}={text!r}>")
                if key.startswith("on") or re.search(r"url\((?!#)", text):
                    found.append(f"<{name} {key}={text!r}>")
        return found

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read(data) -> Page:
    page = Page(render_report(data))
    assert page.problems == []
    return page


@pytest.mark.parametrize(
    "text",
    [
        "<p><b></p></b>",
        "<p>",
        "<p id='a'></p><p id='a'></p>",
        "<script></script>",
        "<a href='https://example.com/'></a>",
        "<p style='background:url(x.png)'></p>",
        "<p onclick='x()'></p>",
    ],
)
def test_the_check_sees_a_bad_page(text):
    assert Page(text).problems


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"features": 26, "towers": 16},
        {"features": 3, "towers": 1},
        {"features": 1, "towers": 1},
        {"features": 3, "towers": 3},
        {"strategy": "round-robin", "affinity": False, "module": "passthrough"},
        {"features": 6, "towers": 2, "hosts": 4},
        {"features": 8, "towers": 4, "hosts": 1},
        {"quality": (), "facts": (), "commands": (), "weight_files": (), "source": {}},
        {"initialisation_notes": tuple(f"note {i}" for i in range(200))},
    ],
)
def test_pages_are_well_formed_and_complete(options):
    data = build_data(**options)
    page = read(data)
    names = {text.strip() for text in page.words}
    assert set(data.spec.flat.feature_names) <= names
    for name, attributes in page.tags:
        if name == "a":
            assert (attributes["href"] or "")[1:] in page.ids
        if name == "svg":
            assert set((attributes["aria-labelledby"] or "").split()) <= page.ids
    tags = [name for name, _ in page.tags]
    assert tags.count("h1") == 1 and tags.count("table") == tags.count("caption")
    assert ("html", {"lang": "en"}) in page.tags
    towers = [a for n, a in page.tags if n == "th" and a.get("data-label") == "Tower"]
    assert len(towers) == len(data.spec.towers)


def test_nothing_points_outside():
    page = render_report(build_data())
    assert "://" not in page and "@import" not in page and "@font-face" not in page
    assert "default-src 'none'" in page


def test_same_data_same_page():
    assert render_report(build_data()) == render_report(build_data())
    assert render_report(build_data()) != render_report(build_data(title="other.pt"))


def test_references_of_the_figure_are_kept():
    text = render_report(build_data())
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)
    assert used and set(used) <= ids
    assert all(name.startswith("partition-") for name in used)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_names_stay_text():
    data = build_data(
        features=len(HOSTILE),
        towers=2,
        names=HOSTILE,
        title=HOSTILE[0],
        facts=(Fact(subject=HOSTILE[0], value=HOSTILE[1], source="read", reason=HOSTILE[2]),),
        weight_files=((HOSTILE[0], 1),),
        commands=(f"dmt verify '{HOSTILE[0]}' x",),
        initialisation_notes=HOSTILE,
        initialisation_method=HOSTILE[0],
        sample_description=HOSTILE[1],
        quality_data=HOSTILE[0],
        labelled_data=HOSTILE[1],
        tool_version=HOSTILE[0],
        source={
            "format": HOSTILE[0],
            "files": [{"name": HOSTILE[1], "bytes": 1}],
            "digest": HOSTILE[0],
        },
    )
    page = read(data)
    text = render_report(data)
    assert "\x01" not in text and "\u202e" not in text
    assert "a\\nb\\u0001\\u202ec" in page.text
    for name in HOSTILE[:-1]:
        assert name in page.text


def test_many_features_stay_small():
    data = build_data(features=600, towers=64)
    text = render_report(data)
    assert len(text.encode()) < 5_000_000
    page = read(data)
    assert set(data.spec.flat.feature_names) <= {word.strip() for word in page.words}
    # shortened towers: the rest of the names is there on demand
    assert [name for name, _ in page.tags].count("details") >= 60


def test_few_features_are_not_folded_and_many_of_a_tower_are(no_figure):
    plain = [name for name, _ in read(build_data(features=40, towers=1)).tags].count("details")
    folded = [name for name, _ in read(build_data(features=41, towers=1)).tags].count("details")
    assert folded == plain + 1


def test_the_order_is_the_one_in_which_one_asks(no_figure):
    page = read(build_data())
    sections = [attributes["id"] for name, attributes in page.tags if name == "section"]
    assert sections == [
        "quality",
        "towers",
        "partition",
        "plan",
        "facts",
        "initialisation",
        "files",
        "next",
    ]


def test_without_affinity_the_page_says_why(no_figure):
    bare = read(build_data(strategy="round-robin", affinity=False)).text
    assert "no affinity matrix" in bare and "Strategy round-robin" in bare
    assert "no affinity matrix" not in read(build_data()).text


def test_what_was_assumed_comes_first(no_figure):
    badges = [
        attributes["class"]
        for name, attributes in read(build_data()).tags
        if name == "span"
        and (attributes.get("class") or "")
        in ("badge assumed", "badge given", "badge inferred", "badge read")
    ]
    assert badges == ["badge assumed", "badge given", "badge inferred", "badge read"]


def test_modelled_numbers_are_called_so(no_figure):
    page = read(build_data())
    estimate = page.text.index("Communication, modelled")
    assert "not measured" in page.text[estimate : estimate + 200]


def test_data_of_another_model_is_refused():
    data, other = build_data(), build_data(features=7)
    with pytest.raises(AssertionError):
        dataclasses.replace(data, partition=other.partition)
    with pytest.raises(AssertionError):
        dataclasses.replace(data, plan=build_data(features=6, towers=3).plan)


def test_the_converted_row_is_the_last_that_is_no_yardstick():
    rows = tuple(
        QualityRow(name=name, r2=0.9, max_abs_diff=1.0, rank_correlation=0.9)
        for name in ("flat", "closed form", "distilled", "random initialisation")
    )
    data = build_data(quality=rows)
    assert data.converted is rows[2] and data.flat is rows[0]
    assert build_data(quality=rows[:1]).converted is None


def test_importing_the_report_is_cheap():
    code = (
        "import sys, dmt_convert.report;"
        "print(*({'torch', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
