"""What crosses hosts: how many bytes it takes, and how near it comes to what was sent.

Letters: D elements that share a scale, V vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmt_convert.cluster.wire import Wire
from dmt_convert.spec import COMM_DTYPES
from support.cluster.client import RunRanks

pytest.importorskip("fbgemm_gpu", reason="int8 is fbgemm's")
TINY = torch.finfo(torch.float32).tiny


def draw_vectors(seed: int, count: int, dim: int, exponent: float) -> Tensor:
    """Normal numbers of a magnitude; a vector of zeros and a zero among others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dim)) * 10.0**exponent
    x[0, 0] = 0.0
    x[-1] = 0.0
    return torch.from_numpy(x.astype(np.float32))


vectors = st.builds(
    draw_vectors,
    seed=st.integers(0, 1000),
    count=st.integers(2, 6),
    dim=st.sampled_from([1, 3, 4, 16]),
    exponent=st.floats(-20, 4),
)


def round_trip(x: Tensor, dtype: str, *, backward: bool = False) -> Tensor:
    wire = Wire(dtype=dtype, vector_dim=x.shape[1], backward=backward)  # type: ignore[arg-type]
    data = wire.encode(x)
    assert data.dtype == torch.uint8
    assert data.shape == (wire.nbytes(x.numel()),)
    found = wire.decode(data)
    assert found.dtype == torch.float32
    return found.view(x.shape)


@given(x=vectors)
def test_fp32_keeps_every_bit(x: Tensor) -> None:
    x[0, 0], x[-1, -1] = -0.0, torch.nan
    assert torch.equal(round_trip(x, "fp32").view(torch.int32), x.view(torch.int32))


@given(x=vectors)
def test_half_precision_rounds_to_nearest(x: Tensor) -> None:
    # 10 and 7 bits of mantissa; below fp16's normal numbers steps of 2^-24
    assert bool(((round_trip(x, "fp16") - x).abs() <= 2.0**-11 * x.abs() + 2.0**-25).all())
    assert bool(((round_trip(x, "bf16") - x).abs() <= 2.0**-8 * x.abs()).all())


@given(x=vectors)
def test_fp16_lifts_gradients(x: Tensor) -> None:
    """Steps are then relative to the largest, which is brought to between 1 and 2."""
    found = round_trip(x, "fp16", backward=True)
    bound = 2.0**-11 * x.abs() + 2.0**-25 * x.abs().max()
    assert bool(((found - x).abs() <= bound).all())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("exponent", [-44, -40, -37, -30, 30])
def test_gradients_of_any_magnitude_travel(dtype: str, exponent: int) -> None:
    """Below 1e-33 fp8 may give zeros, its scales being normal numbers."""
    least = torch.finfo(torch.float8_e5m2).max * TINY if dtype == "fp8" else 2 * TINY
    x = torch.tensor([[1.0, -0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]]) * 10.0**exponent
    found = round_trip(x, dtype, backward=True)
    assert bool(((found - x).abs() <= 2.0**-3 * x.abs().max() + least).all())
    assert bool((round_trip(x * 0, dtype, backward=True) == 0).all())


def test_fp16_clamps_what_it_cannot_hold() -> None:
    x = torch.tensor([[65504.0, 65519.0, 65520.0, 1e30], [-1e30, torch.inf, -torch.inf, torch.nan]])
    largest = 65504.0
    expected = torch.tensor([[largest] * 4, [-largest, largest, -largest, torch.nan]])
    torch.testing.assert_close(round_trip(x, "fp16"), expected, rtol=0, atol=0, equal_nan=True)


@given(x=vectors)
def test_int8_is_off_by_half_a_step_of_its_vector(x: Tensor) -> None:
    top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    # fbgemm takes the range for 1e-8 more when it rounds; scale * step + bias is in float32
    half_step = (top - bottom) / 255 / 2 + 1e-8
    rounding = 2.0**-22 * torch.maximum(top.abs(), bottom.abs())
    assert bool(((round_trip(x, "int8") - x).abs() <= half_step + rounding).all())


@given(x=vectors)
def test_int8_lifts_gradients(x: Tensor) -> None:
    """What fbgemm adds to a range is then small beside the largest of all."""
    largest, step = x.abs().max(), (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
    found = round_trip(x, "int8", backward=True)
    assert bool(((found - x).abs() <= step / 2 + (1e-8 + 2.0**-22) * largest).all())


@given(x=vectors, backward=st.booleans())
def test_fp8_is_off_by_half_a_unit_of_its_mantissa(x: Tensor, backward: bool) -> None:
    kind = torch.finfo(torch.float8_e5m2 if backward else torch.float8_e4m3fn)
    scale = x.abs().amax(1, keepdim=True) / kind.max
    # 3 and 2 bits of mantissa; half a step among subnormal numbers; scaling there and back
    bound = (kind.eps / 2 + 2.0**-21) * x.abs() + scale * kind.tiny * kind.eps / 2
    found = round_trip(x, "fp8", backward=backward)
    assert bool(((found - x).abs() <= bound).all())
    assert not found[-1].any()


@pytest.mark.parametrize("backward", [False, True])
def test_fp8_of_subnormal_numbers_is_small(backward: bool) -> None:
    x = torch.logspace(-44, -38, 200).unsqueeze(1) * torch.tensor([[1.0, -0.5, 0.0, 0.25]])
    found = round_trip(x, "fp8", backward=backward)
    assert bool(((found - x).abs() <= TINY).all())


@pytest.mark.parametrize("dtype", COMM_DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_parts_of_a_matrix_travel_as_their_copies_do(dtype: str, backward: bool) -> None:
    """Columns and rows of a larger matrix are not contiguous."""
    x = draw_vectors(0, 6, 24, 0.0)
    for part in (x[:, 8:16], x[2:5, 4:20], x[1:2]):
        wire = Wire(dtype=dtype, vector_dim=4, backward=backward)  # type: ignore[arg-type]
        data = wire.encode(part)
        assert len(data) == wire.nbytes(part.numel())
        assert torch.equal(wire.decode(data), wire.decode(wire.encode(part.clone())))


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [("fp32", 96, 96), ("fp16", 48, 52), ("bf16", 48, 48), ("int8", 72, 76), ("fp8", 48, 48)],
)
def test_bytes_of_twenty_four_elements(dtype: str, forward: int, backward: int) -> None:
    """int8 has a scale and a bias per vector, fp8 a scale; fp16 and int8 gradients a factor."""
    for is_backward, expected in ((False, forward), (True, backward)):
        wire = Wire(dtype=dtype, vector_dim=4, backward=is_backward)  # type: ignore[arg-type]
        assert wire.nbytes(24) == expected
        assert wire.nbytes(0) == 0


UNITS = {
    "fp16": (2.0**-11, 2.0**-11),
    "bf16": (2.0**-8, 2.0**-8),
    "int8": (1 / 255, 1 / 255),
    "fp8": (2.0**-4, 2.0**-3),
}
"""Rounding of one element, forward and backward: relative to it, int8 relative to its vector."""
SLACK = 4
"""A logit sums elements of either sign, and is smaller than the largest of them may be."""
CASE: dict[str, Any] = {
    "dtypes": ["fp32", *UNITS],
    "towers": [[[40, 16], [40, 32]], [[40, 16]]],
    "interaction": "cat",
    "rows_per_rank": 32,
}


@pytest.fixture(scope="module")
def wires(run_ranks: RunRanks) -> list[dict[str, Any]]:
    return run_ranks(2, 1, "compare_wires", **CASE)


@pytest.fixture(scope="module")
def wires_of_large_batches(run_ranks: RunRanks) -> list[dict[str, Any]]:
    """As if a rank had 131,072 rows, over which gradients are means."""
    factor = 1 / 4096
    return run_ranks(2, 1, "compare_wires", loss_factor=factor, table_lr=0.5 / factor, **CASE)


@pytest.mark.parametrize("dtype", UNITS)
def test_a_step_over_two_hosts_is_near_to_that_in_fp32(
    wires: list[dict[str, Any]], dtype: str
) -> None:
    """Logits relative to the largest, and what the backward pass moved relative to its largest."""
    forward, backward = UNITS[dtype]
    for found in wires:
        assert 0 < found[dtype]["logits"] <= SLACK * forward
        assert 0 < found[dtype]["moves"] <= SLACK * max(forward, backward)


@pytest.mark.parametrize("dtype", UNITS)
def test_gradients_of_large_batches_travel_as_well(
    wires_of_large_batches: list[dict[str, Any]], dtype: str
) -> None:
    for found in wires_of_large_batches:
        assert found[dtype]["moves"] <= SLACK * max(UNITS[dtype])


def test_a_step_is_repeatable(wires: list[dict[str, Any]]) -> None:
    assert [found["fp32"] for found in wires] == [{"logits": 0, "moves": 0}] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_int8_does_not_hide_that_training_diverged(value: float) -> None:
    wire = Wire(dtype="int8", vector_dim=4)
    found = wire.decode(wire.encode(torch.tensor([[value, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])))
    assert found[:4].isnan().all()
    assert torch.allclose(found[4:], torch.tensor([1.0, 2.0, 3.0, 4.0]), atol=0.02)
