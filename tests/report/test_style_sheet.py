"""Colours can be told apart by those who read them."""

from __future__ import annotations

import re

import pytest

from support.paths import REPOSITORY

STYLE = (REPOSITORY / "dmt_convert/report/report.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
)

PAIRS = [
    ("ink", "paper"),
    ("ink", "card"),
    ("ink", "track"),
    ("muted", "paper"),
    ("muted", "card"),
    ("accent", "paper"),
    ("bad", "paper"),
    ("good", "paper"),
    *((name, f"{name}-paper") for name in ("good", "warn", "bad", "calm")),
    *(("ink", f"{name}-paper") for name in ("good", "warn", "bad", "calm")),
]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_known_colours():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") < 4.5


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize(("text", "paper"), PAIRS)
def test_text_has_contrast(colours, text, paper):
    assert contrast(colours[text], colours[paper]) >= 4.5


def test_every_variable_is_defined_in_both():
    used = set(re.findall(r"var\(--([a-z-]+)\)", STYLE))
    assert used == set(LIGHT) == set(DARK)


def test_braces_balance():
    assert STYLE.count("{") == STYLE.count("}")
