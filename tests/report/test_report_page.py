"""The page: well formed, self-contained, complete, and safe against names out of files."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from dmt_convert.documents import (
    EvaluationRecord,
    FinetuneRecord,
    Initialisation,
    ParentRecord,
    QualityRow,
    Source,
    SourceFile,
    Tool,
    TrainingDataRecord,
    WeightsFile,
)
from dmt_convert.families import Fact
from dmt_convert.report import render_documents
from dmt_convert.report.page import render_page
from support.reports import NO_FIGURE, build_view

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
    page = Page(render_page(data))
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
        {"rows": (), "facts": (), "weights": {}, "source": Source()},
        {"initialisation": Initialisation(notes=tuple(f"note {i}" for i in range(200)))},
    ],
)
def test_pages_are_well_formed_and_complete(options):
    data = build_view(**options, figure=None)
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
    page = render_page(build_view(figure=None))
    assert "://" not in page and "@import" not in page and "@font-face" not in page
    assert "default-src 'none'" in page


def test_same_data_same_page():
    other = build_view(source=Source(name="other.pt"))
    assert render_page(build_view(figure=None)) == render_page(build_view(figure=None))
    assert render_page(build_view()) != render_page(other)


def test_references_of_the_figure_are_kept():
    text = render_page(build_view(figure=None))
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)
    assert used and set(used) <= ids
    assert all(name.startswith("partition-") for name in used)


def finetuned(text: str = "rows") -> FinetuneRecord:
    """A record whose texts are all the same."""
    start = EvaluationRecord(step=0, auc=0.5, ne=1.0, log_loss=0.7)
    best = EvaluationRecord(step=40, auc=0.625, ne=0.9, log_loss=0.6, train_loss=0.65)
    return FinetuneRecord(
        parent=ParentRecord(name=text, digest=text),
        data=TrainingDataRecord(train=text, train_rows=4000, valid=text, valid_rows=1000),
        settings={"dense_lr": 0.01, "note": text, "unset": None},
        steps=50,
        best_step=40,
        before=start,
        after=best,
        history=(start, *[best] * 30),
        notes=(text,),
    )


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("finetune", [None, finetuned(HOSTILE[4])])
def test_hostile_names_stay_text(finetune):
    data = build_view(
        features=len(HOSTILE),
        towers=2,
        names=HOSTILE,
        figure=None,
        facts=(Fact(subject=HOSTILE[0], value=HOSTILE[1], source="read", reason=HOSTILE[2]),),
        weights={HOSTILE[0]: WeightsFile(bytes=1, digests={})},
        initialisation=Initialisation(
            notes=HOSTILE, method=HOSTILE[0], sample=HOSTILE[1], finetune=finetune
        ),
        labelled=HOSTILE[1],
        tool=Tool(version=HOSTILE[0]),
        source=Source(
            name=HOSTILE[0],
            format=HOSTILE[0],
            files=(SourceFile(name=HOSTILE[1], bytes=1),),
            digest=HOSTILE[0],
        ),
    )
    page = read(data)
    text = render_page(data)
    assert "\x01" not in text and "\u202e" not in text
    assert "a\\nb\\u0001\\u202ec" in page.text
    for name in HOSTILE[:-1]:
        assert name in page.text


@pytest.mark.slow
def test_many_features_stay_small():
    data = build_view(features=600, towers=64, figure=None)
    text = render_page(data)
    assert len(text.encode()) < 5_000_000
    page = read(data)
    assert set(data.spec.flat.feature_names) <= {word.strip() for word in page.words}
    # shortened towers: the rest of the names is there on demand
    assert [name for name, _ in page.tags].count("details") >= 60


def test_few_features_are_not_folded_and_many_of_a_tower_are():
    plain = [name for name, _ in read(build_view(features=40, towers=1)).tags].count("details")
    folded = [name for name, _ in read(build_view(features=41, towers=1)).tags].count("details")
    assert folded == plain + 1


def test_the_order_is_the_one_in_which_one_asks():
    page = read(build_view())
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


def test_without_affinity_the_page_says_why():
    bare = read(build_view(strategy="round-robin", affinity=False)).text
    assert "no affinity matrix" in bare and "Strategy round-robin" in bare
    assert "no affinity matrix" not in read(build_view()).text


def test_what_was_assumed_comes_first():
    badges = [
        attributes["class"]
        for name, attributes in read(build_view()).tags
        if name == "span"
        and (attributes.get("class") or "")
        in ("badge assumed", "badge given", "badge inferred", "badge read")
    ]
    assert badges == ["badge assumed", "badge given", "badge inferred", "badge read"]


def test_modelled_numbers_are_called_so():
    page = read(build_view())
    estimate = page.text.index("Communication, modelled")
    assert "not measured" in page.text[estimate : estimate + 200]


def test_the_plan_of_another_model_is_refused():
    with pytest.raises(AssertionError):
        dataclasses.replace(build_view(), plan=build_view(features=6, towers=3).plan)


def test_the_verdict_says_whether_the_inputs_were_drawn():
    view = build_view()
    for config, drawn in (({"towers": 2}, True), ({"calibration": "day"}, False), (None, False)):
        made = dataclasses.replace(view.manifest, config=config)
        text = dataclasses.replace(view, manifest=made).verdict.text
        assert ("--calibration DATA" in text) is drawn and ("held-out rows" in text) is not drawn


def test_the_next_commands_lead_on():
    """A compressed model differs from the flat one; to verify it would end with a difference."""
    verbs = [command.split()[1] for _, command in build_view().commands]
    assert verbs == ["evaluate", "finetune", "export", "plan", "convert"]


def test_a_finetuned_bundle_says_what_it_gained():
    rows = (QualityRow(name="flat"), QualityRow(name="fine-tuned", auc=0.625, ne=0.9))
    made = Initialisation(finetune=finetuned("day 23"))
    view = build_view(rows=rows, initialisation=made)
    page = read(view)
    assert next(name for _, name in view.commands).startswith("dmt evaluate ckpt-dmt2")
    assert "finetune" in page.ids and "no longer the flat model" in view.verdict.headline
    for said in ("0.50000 → 0.62500 (+0.12500; higher is better)", "dense_lr 0.01", "day 23"):
        assert said in page.text
    assert "unset" not in page.text
    # evaluations beyond the first ones are there on demand
    assert page.text.count("0.65000") == 30


def test_the_documents_of_a_bundle(tmp_path):
    view = build_view()
    out = tmp_path / "new"
    found = render_documents(view.manifest, view.plan, out, figure=NO_FIGURE)
    assert set(found) == {"report.html", "partition.svg"}
    assert found["partition.svg"] == NO_FIGURE and "ordered by tower" in found["report.html"]
    assert "dmt evaluate new --data" in found["report.html"]
    drawn = render_documents(view.manifest, view.plan, out)
    assert "Lookups per sample" in drawn["partition.svg"]
    assert "ordered by tower" not in drawn["report.html"]


def test_the_converted_row_is_the_last_that_is_no_yardstick():
    rows = tuple(
        QualityRow(name=name, r2=0.9, max_abs_diff=1.0, rank_correlation=0.9)
        for name in ("flat", "closed form", "distilled", "random initialisation")
    )
    data = build_view(rows=rows)
    assert data.converted is rows[2] and data.flat is rows[0]
    assert build_view(rows=rows[:1]).converted is None


def test_importing_the_report_is_cheap():
    code = (
        "import sys, dmt_convert.report;"
        "print(*({'torch', 'matplotlib', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
