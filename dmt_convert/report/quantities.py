"""Numbers as a person reads them. All results are plain text, not yet escaped."""

from __future__ import annotations

import math
from typing import Final

DASH: Final = "–"
"""Stands where nothing is known."""

_MINUS: Final = "−"
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def show_bytes(count: float) -> str:
    """Three digits and a binary unit: `6.50 KiB`."""
    power = 0
    # 1023.5 would be written as 1024
    while abs(count) >= 999.5 and power < len(_UNITS) - 1:
        count /= 1024
        power += 1
    if power == 0:
        return f"{show_number(count)} {'byte' if count == 1 else 'bytes'}"
    return f"{_digits(count)} {_UNITS[power]}"


def show_bytes_change(before: float, after: float) -> str:
    """Bytes before and after, the unit once where it is the same: `4.88 → 2.44 KiB`."""
    first, second = show_bytes(before), show_bytes(after)
    if first.split()[-1] == second.split()[-1]:
        first = first.split()[0]
    return f"{first} → {second}"


def show_number(value: float) -> str:
    """A count with commas; one that is not whole keeps three digits."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else _digits(value)
    return text.replace("-", _MINUS)


def show_factor(value: float) -> str:
    """A ratio: `2.00×`."""
    return f"{_digits(value)}×" if math.isfinite(value) else "not finite"


def show_share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    if whole <= 0:
        return DASH
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "< 0.1 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def show_agreement(value: float | None) -> str:
    """R² or a correlation: digits enough to tell it from 1, at least four."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "undefined"
    gap = abs(1 - value)
    if gap == 0:
        return "1"
    if gap < 1e-8:
        return "1 − " + show_small(gap)
    if value < 0:
        return f"{_MINUS}{_digits(-value)}"
    places = min(10, max(4, 1 - math.floor(math.log10(gap))))
    return f"{value:.{places}f}"


def show_small(value: float | None) -> str:
    """A difference: three digits, by power of ten where it is tiny."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        superscript = str(int(exponent)).translate(_SUPERSCRIPTS)
        return f"{mantissa} · 10{superscript}".replace("-", _MINUS)
    return _digits(value).replace("-", _MINUS)


def show_metric(value: float | None) -> str:
    """AUC, log loss or NE: five decimals."""
    if value is None:
        return DASH
    return f"{value:.5f}".replace("-", _MINUS) if math.isfinite(value) else "undefined"


def show_change(value: float) -> str:
    """A signed change of such a metric."""
    if not math.isfinite(value):
        return "undefined"
    text = f"{value:+.5f}"
    return "±0" if float(text) == 0 else text.replace("-", _MINUS)


def show_percent_change(before: float, after: float) -> str:
    """A signed relative change."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return "undefined"
    text = f"{100 * (after / before - 1):+.2f}"
    return "±0 %" if float(text) == 0 else f"{text} %".replace("-", _MINUS)


def show_seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e9)} ns"


def plural(count: int, noun: str) -> str:
    """`1 tower`, `4 towers`."""
    return f"{show_number(count)} {noun}{'' if count == 1 else 's'}"


_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _digits(value: float) -> str:
    """Three significant digits, never more than two decimals, without an exponent."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 or value == 0 else f"{value:.4f}"
