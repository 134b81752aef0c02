"""Codes of table rows: how far they are from the rows, and that nothing else decides them."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.errors import ExportError
from dmt_convert.model.table_codes import (
    LEVELS,
    IntCode,
    coded_width,
    decode_rows,
    encode_rows,
    recode_rows,
    to_half,
)

Rows = npt.NDArray[np.float32]
INT_CODES: tuple[IntCode, ...] = ("int8", "int4")
LARGEST = float(np.finfo(np.float32).max)


def name(row: int) -> str:
    return f"row {row}"


def recoded(rows: Rows, code: IntCode) -> Rows:
    coded = encode_rows(rows, code, name)
    count, dim = rows.shape
    assert coded.quantized.shape == (count, coded_width(dim, code))
    assert (coded.quantized.dtype, coded.scale.dtype, coded.zero_point.dtype) == (
        np.uint8,
        np.float32,
        np.uint8,
    )
    return decode_rows(coded, dim, code)


def half_a_step(rows: Rows, code: IntCode) -> npt.NDArray[np.float64]:
    low, high = rows.min(axis=1).clip(max=0), rows.max(axis=1).clip(min=0)
    return (high.astype(np.float64) - low)[:, None] / LEVELS[code] / 2


@pytest.mark.parametrize("code", INT_CODES)
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 128])
def test_rows_come_back_within_half_a_step(code: IntCode, dim: int) -> None:
    rng = np.random.default_rng(dim)
    scales = 10.0 ** rng.uniform(-30, 30, size=(900, 1))
    rows = ((rng.standard_normal((900, dim)) + rng.normal(size=(900, 1))) * scales).astype("f4")
    error = np.abs(recoded(rows, code).astype(np.float64) - rows)
    if code == "int8":
        assert (error <= half_a_step(rows, code) * 1.0001).all()
    # int4 may cut a row's ends off where the rest gains by it
    plain = np.square(half_a_step(rows, code) * 1.0001).sum(axis=1) * dim
    assert (np.square(error).sum(axis=1) <= plain).all()


@pytest.mark.parametrize(("code", "limit"), [("int8", 0.0062), ("int4", 0.097)])
def test_error_of_normal_rows(code: IntCode, limit: float) -> None:
    """Min-max scales give 0.0059 and 0.1005 here: int4's search is worth its time."""
    rows = np.random.default_rng(0).standard_normal((2000, 128), dtype=np.float32)
    assert 0.5 * limit < np.sqrt(np.square(recoded(rows, code) - rows).mean()) < limit


@pytest.mark.parametrize("code", INT_CODES)
def test_special_rows(code: IntCode) -> None:
    rows = np.zeros((12, 5), dtype=np.float32)
    rows[1] = 0.7
    rows[2] = -3e-5
    rows[3, 2] = 1.0
    rows[4] = 1e-45  # the least subnormal
    rows[5] = [0, 1e-44, 2e-44, -1e-44, 0]
    rows[6] = [1e-40, -2e-40, 3e-41, 0, 1e-45]
    rows[7] = 1e38
    rows[8] = [1e37, -1e38, 3, 0, 1]
    rows[9] = -0.0
    rows[10] = [1e-45, 0, 0, 0, 1]
    values = recoded(rows, code)
    coded = encode_rows(rows, code, name)
    assert np.isfinite(values).all()
    zeros = [0, 9, 11]
    assert not values[zeros].any()
    assert not coded.quantized[zeros].any()
    assert not coded.scale[zeros].any()
    assert not coded.zero_point[zeros].any()
    constant = [1, 2, 3, 7]
    np.testing.assert_allclose(values[constant], rows[constant], rtol=1e-6)
    np.testing.assert_array_equal(values[4], rows[4])
    slack = np.float64(1e-45) + half_a_step(rows, code) * (1.01 if code == "int8" else 2)
    assert (np.abs(values.astype(np.float64) - rows) <= slack).all()
    # zero is always a value of the code
    assert (values[rows == 0] == 0).all()


@pytest.mark.parametrize("code", [*INT_CODES, "fp16"])
@pytest.mark.parametrize(
    ("value", "found"), [(np.nan, "NaN or Inf"), (-np.inf, "NaN or Inf"), (LARGEST, "too large")]
)
def test_refusals_name_the_row(code: IntCode, value: float, found: str) -> None:
    rows = np.ones((40_000, 16), dtype=np.float32)
    rows[33_333, 7] = value
    if value == LARGEST:
        rows[33_333, 8] = -1e38  # rounded up, the least and the largest would both overflow
    if value == LARGEST and code == "int8":
        return  # half a step less than the largest number is a number
    with pytest.raises(ExportError, match=found) as raised:
        recode_rows(rows, code, name)
    assert raised.value.found.startswith("row 33333 ")
    assert code in raised.value.found or "finite" in raised.value.expected


def test_half_rounds_as_numpy_does() -> None:
    rows = np.array([[65519.996, -65519.996, 1e-8, 6e-8], [1.0004883, 0, -0.0, 3e-5]], dtype="f4")
    np.testing.assert_array_equal(to_half(rows, name), rows.astype(np.float16))
    rows[1, 2] = 65520
    with pytest.raises(ExportError, match=r"row 1 holds 6.552e\+04, too large for fp16"):
        to_half(rows, name)


@pytest.mark.parametrize("code", INT_CODES)
@given(data=st.data())
def test_a_row_is_coded_by_itself(code: IntCode, data: st.DataObject) -> None:
    """To the bit: alone, among others, strided, read-only."""
    dim = data.draw(st.integers(1, 130))
    count = data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    rows = rng.standard_normal((count, dim), dtype=np.float32)
    whole = encode_rows(rows, code, name)
    picked = rng.permutation(count)
    for index in (picked, picked[:1]):
        again = rows[index]
        again.setflags(write=False)
        part = encode_rows(again, code, name)
        np.testing.assert_array_equal(part.quantized, whole.quantized[index])
        np.testing.assert_array_equal(part.scale, whole.scale[index])
        np.testing.assert_array_equal(part.zero_point, whole.zero_point[index])
    strided = encode_rows(np.repeat(rows, 2, axis=0)[::2], code, name)
    np.testing.assert_array_equal(strided.scale, whole.scale)


@pytest.mark.parametrize("dim", [4, 5])
def test_nibbles_are_packed_by_halves(dim: int) -> None:
    rows = np.arange(dim, dtype=np.float32)[None] / (dim - 1) * 15
    coded = encode_rows(rows, "int4", name)
    codes = np.rint(rows / coded.scale[:, None]).astype(int)[0]
    half = (dim + 1) // 2
    low, high = coded.quantized[0] & 15, coded.quantized[0] >> 4
    np.testing.assert_array_equal(low, codes[:half])
    np.testing.assert_array_equal(high[: dim - half], codes[half:])
    assert coded.zero_point[0] == 0
