"""What the report says of quality: the verdict, the changes, and what is not known."""

from __future__ import annotations

import html
import re

import pytest

from dmt_convert.documents import QualityRow
from dmt_convert.report.page import render_page
from support.reports import build_view

FLAT = QualityRow(name="flat", r2=1.0, max_abs_diff=0.0, rank_correlation=1.0)


def plain(view) -> str:
    """The text of the page."""
    body = render_page(view).split("<body>")[1]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def row(name: str = "closed form", **values: float | None) -> QualityRow:
    fields: dict[str, float | None] = {"r2": 0.5, "max_abs_diff": 1.0, "rank_correlation": 0.5}
    return QualityRow(name=name, **{**fields, **values})


@pytest.mark.parametrize(
    ("r2", "level"),
    [
        (1.0, "close"),
        (0.99, "close"),
        (0.98, "fair"),
        (0.97, "far"),
        (-4.0, "far"),
        (None, "unknown"),
        (float("nan"), "unknown"),
        (float("-inf"), "unknown"),
    ],
)
def test_verdict_of_a_compressed_model(r2, level):
    view = build_view(rows=(FLAT, row(r2=r2)))
    assert view.verdict.level == level
    assert f'class="verdict {level}"' in render_page(view)
    assert "--tower-module passthrough" in plain(view)


@pytest.mark.parametrize(
    ("difference", "level"), [(0.0, "exact"), (1e-6, "exact"), (None, "exact"), (0.2, "far")]
)
def test_verdict_of_passthrough(difference, level):
    view = build_view(
        module="passthrough", rows=(FLAT, row("passthrough", r2=1.0, max_abs_diff=difference))
    )
    assert view.verdict.level == level
    assert "with --tower-module passthrough" not in plain(view)


def test_a_passthrough_that_is_not_a_number_is_not_exact():
    view = build_view(
        module="passthrough", rows=(FLAT, row("passthrough", max_abs_diff=float("nan")))
    )
    assert view.verdict.level == "far"


def test_a_compressed_model_is_never_called_exact():
    perfect = row(r2=1.0, max_abs_diff=0.0, rank_correlation=1.0)
    verdict = build_view(rows=(FLAT, perfect)).verdict
    assert "not exact" in verdict.headline


def test_changes_of_accuracy_are_signed_and_coloured():
    flat = row("flat", r2=1.0, auc=0.8, log_loss=0.45, ne=0.8)
    worse = row(auc=0.799, log_loss=0.451, ne=0.804)
    better = row(auc=0.801, log_loss=0.449, ne=0.796)
    for converted, kind, auc, ne in (
        (worse, "worse", "−0.00100", "+0.50 %"),
        (better, "better", "+0.00100", "−0.50 %"),
    ):
        text = render_page(build_view(rows=(flat, converted), labelled="rows of day 23"))
        assert text.count(f'class="change {kind}"') == 3
        assert auc in text and ne in text and "rows of day 23" in text
        assert text.count('class="change ') == 3


def test_equal_accuracy_is_no_change():
    flat = row("flat", auc=0.8, log_loss=0.45, ne=0.8)
    view = build_view(rows=(flat, row(auc=0.8, log_loss=0.45, ne=0.8)), labelled="rows of day 23")
    assert render_page(view).count('class="change same"') == 3


def test_what_is_not_known_is_a_dash():
    unknown = row(r2=None, max_abs_diff=None, rank_correlation=None)
    view = build_view(rows=(unknown,))
    page = render_page(view)
    cells = re.search(r'<table class="quality">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert cells is not None
    assert re.findall(r"<td[^>]*><div>(.*?)</div>", cells.group(1)) == [
        '<span class="bar dmt" aria-hidden="true"><span style="width:0.0%"></span></span>–',
        *["–"] * 5,
    ]
    assert "None" not in plain(view) and "nan" not in plain(view)
    assert "No labels were given" in plain(view)


def test_the_headline_counts_what_crosses_hosts():
    text = plain(build_view(features=6, towers=2))
    # 6 features of 8 floats, half of them for the other host; half of that after the modules
    assert "96 → 48 bytes" in text and "2.00×" in text and "6 → 2" in text
    assert "one host" in plain(build_view(hosts=1))
