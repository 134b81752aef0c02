"""Numbers as a person reads them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.report.quantities import (
    show_agreement,
    show_bytes,
    show_bytes_change,
    show_change,
    show_factor,
    show_metric,
    show_number,
    show_percent_change,
    show_seconds,
    show_share,
    show_small,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_bytes(0), "0 bytes"),
        (show_bytes(1), "1 byte"),
        (show_bytes(999), "999 bytes"),
        (show_bytes(1023), "1.00 KiB"),
        (show_bytes(6656), "6.50 KiB"),
        (show_bytes(1024**3 * 22.14), "22.1 GiB"),
        (show_bytes(1024**2 - 1), "1.00 MiB"),
        (show_bytes(2**70), "1,048,576 PiB"),
        (show_bytes_change(4992, 2496), "4.88 → 2.44 KiB"),
        (show_bytes_change(4992, 96), "4.88 KiB → 96 bytes"),
        (show_number(1234567), "1,234,567"),
        (show_number(12.345), "12.3"),
        (show_number(-2), "−2"),
        (show_factor(2), "2.00×"),
        (show_factor(float("inf")), "not finite"),
        (show_share(1, 4), "25 %"),
        (show_share(1, 64), "1.6 %"),
        (show_share(1, 10_000), "< 0.1 %"),
        (show_share(0, 4), "0 %"),
        (show_share(0, 0), "–"),
        (show_agreement(None), "–"),
        (show_agreement(1.0), "1"),
        (show_agreement(0.98731), "0.9873"),
        (show_agreement(0.99999761), "0.9999976"),
        (show_agreement(1 - 1e-10), "1 − 1.0 · 10⁻¹⁰"),
        (show_agreement(-3.21), "−3.21"),
        (show_agreement(float("nan")), "undefined"),
        (show_small(None), "–"),
        (show_small(0.0), "0"),
        (show_small(2.4e-7), "2.4 · 10⁻⁷"),
        (show_small(0.2113), "0.21"),
        (show_small(0.0123), "0.0123"),
        (show_small(float("inf")), "not finite"),
        (show_metric(0.80213), "0.80213"),
        (show_metric(None), "–"),
        (show_change(-0.001), "−0.00100"),
        (show_change(1e-9), "±0"),
        (show_percent_change(0.8, 0.804), "+0.50 %"),
        (show_percent_change(0.0, 1.0), "undefined"),
        (show_seconds(0.00166), "1.66 ms"),
        (show_seconds(2.5), "2.50 s"),
        (show_seconds(3e-9), "3.00 ns"),
        (show_seconds(0), "0 s"),
    ],
)
def test_examples(shown, expected):
    assert shown == expected


@settings(derandomize=True, deadline=None)
@given(st.floats(min_value=0, max_value=1))
def test_agreement_is_never_rounded_up_to_one(value):
    assert (show_agreement(value) == "1") == (value == 1)


@settings(derandomize=True, deadline=None)
@given(st.floats(min_value=1, max_value=2**59))
def test_bytes_can_be_read_back(count):
    number, unit = show_bytes(count).split()
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = 0 if unit == "byte" else units.index(unit)
    assert math.isclose(float(number.replace(",", "")) * 1024**power, count, rel_tol=0.006)
