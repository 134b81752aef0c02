"""What crosses hosts: how many bytes it takes, and how near it comes to what was sent.

Letters: B samples, O elements of a tower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmt_convert.cluster.wire import Floats, Format, Levels, Scaled, Wire
from dmt_convert.model import Code, TowerCode
from dmt_convert.spec import COMM_DTYPES
from support.cluster.client import RunRanks

TINY = torch.finfo(torch.float32).tiny


def draw_samples(seed: int, count: int, width: int, exponent: float) -> Tensor:
    """Normal numbers of a magnitude; a sample of zeros and a zero among others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)) * 10.0**exponent
    x[0, 0] = 0.0
    x[-1] = 0.0
    return torch.from_numpy(x.astype(np.float32))


samples = st.builds(
    draw_samples,
    seed=st.integers(0, 1000),
    count=st.integers(2, 6),
    width=st.sampled_from([1, 3, 4, 16]),
    exponent=st.floats(-20, 4),
)


def make_format(dtype: str, width: int, *, backward: bool = False) -> Format:
    if dtype in ("fp32", "bf16"):
        return Floats(dtype, width)  # type: ignore[arg-type]
    return Scaled(dtype, width, backward=backward)  # type: ignore[arg-type]


def round_trip(x: Tensor, dtype: str, *, backward: bool = False) -> Tensor:
    return send(x, Wire([make_format(dtype, x.shape[1], backward=backward)]))


def send(x: Tensor, wire: Wire, parts: int = 1) -> Tensor:
    batch = len(x) // parts
    messages = wire.encode(x, parts)
    assert {m.dtype for m in messages} == {torch.uint8}
    assert {m.shape for m in messages} == {(wire.message_bytes(batch),)}
    assert all(m.is_contiguous() for m in messages)
    found = torch.cat([wire.decode(message, batch) for message in messages])
    assert found.dtype == torch.float32
    return found


def make_levels(x: Tensor, int4: int = 0) -> Levels:
    """Levels whose ranges are those of the values."""
    code = Code(TowerCode(precision="int8", int4=int4), x.shape[1])
    highest = torch.full((x.shape[1],), 254.0)
    highest[x.shape[1] - int4 :] = 15.0
    code.low.copy_(x.amin(dim=0))
    code.step.copy_((x.amax(dim=0) - x.amin(dim=0)) / highest)
    return Levels(code)


@given(x=samples)
def test_fp32_keeps_every_bit(x: Tensor) -> None:
    x[0, 0], x[-1, -1] = -0.0, torch.nan
    assert torch.equal(round_trip(x, "fp32").view(torch.int32), x.view(torch.int32))


@given(x=samples)
def test_bf16_rounds_to_nearest(x: Tensor) -> None:
    assert bool(((round_trip(x, "bf16") - x).abs() <= 2.0**-8 * x.abs()).all())


@given(x=samples, backward=st.booleans())
def test_scales_are_of_a_tower_and_sample(x: Tensor, backward: bool) -> None:
    """Off by half a unit of the mantissa, or half a step of the largest element."""
    largest = x.abs().amax(dim=1, keepdim=True)
    # the scale is off by 2^-8 at most, and there and back cost roundings of float32
    steps = {"int8": largest / 127 / 2 * (1 + 2.0**-7), "fp16": largest * 2.0**-25 + TINY}
    units = {"int8": 2.0**-21, "fp16": 2.0**-11 + 2.0**-21}
    kind = torch.finfo(torch.float8_e5m2 if backward else torch.float8_e4m3fn)
    steps["fp8"] = largest / kind.max * (1 + 2.0**-7) * kind.tiny * kind.eps / 2
    units["fp8"] = kind.eps / 2 + 2.0**-20
    for dtype, step in steps.items():
        found = round_trip(x, dtype, backward=backward)
        assert bool(((found - x).abs() <= units[dtype] * x.abs() + step).all()), dtype
        assert not found[-1].any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("exponent", [-44, -40, -37, -30, 30])
def test_gradients_of_any_magnitude_travel(dtype: str, exponent: int) -> None:
    """Scales are normal numbers: a sample whose scale would be smaller arrives as zeros."""
    least = 2.0**16 * TINY
    x = torch.tensor([[1.0, -0.5, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]]) * 10.0**exponent
    found = round_trip(x, dtype, backward=True)
    assert bool(((found - x).abs() <= 2.0**-3 * x.abs().max() + least).all())
    assert bool((round_trip(x * 0, dtype, backward=True) == 0).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp8"])
def test_scales_do_not_hide_that_training_diverged(dtype: str, value: float) -> None:
    found = round_trip(torch.tensor([[value, 1.0, 2.0], [1.0, 2.0, 3.0]]), dtype)
    assert found[0].isnan().all() and found[1].isfinite().all()


@given(x=samples, int4=st.integers(0, 3))
def test_levels_arrive_as_the_code_rounds(x: Tensor, int4: int) -> None:
    levels = make_levels(x, min(int4, x.shape[1]))
    levels.code.step.clamp_(min=1e-6)
    assert torch.equal(send(x, Wire([levels])), levels.code.round(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_message_of_levels_says_that_training_diverged(value: float) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    wire = Wire([make_levels(x, 1)])
    x[3, 2] = value
    found = send(x, wire, parts=2)
    assert found[:3].isfinite().all() and found[3:].isnan().all()


def make_mixed(x: Tensor, *, backward: bool = False) -> list[Format]:
    """Towers of 3, 2, 5, 1, 2 and 3 elements."""
    return [
        make_levels(x[:, :3], 1),
        Floats("bf16", 2),
        Scaled("int8", 5, backward=backward),
        Floats("fp32", 1),
        Floats("fp32", 2),
        Scaled("fp16", 3, backward=backward),
    ]


def test_towers_share_a_message() -> None:
    """Every one in its own bits: 3 + 4 + 7 + 4 + 8 + 8 bytes a sample, and one of the message."""
    x = draw_samples(1, 8, 16, 0.0)
    wire = Wire(make_mixed(x))
    assert (wire.nbytes, wire.message_bytes(8), wire.message_bytes(0)) == (34, 8 * 34 + 1, 0)
    apart = [
        send(part, Wire([each]), parts=2)
        for each, part in zip(make_mixed(x), x.split([3, 2, 5, 1, 2, 3], dim=1), strict=True)
    ]
    assert torch.equal(send(x, wire, parts=2), torch.cat(apart, dim=1))


@pytest.mark.parametrize("dtype", COMM_DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_parts_of_a_matrix_travel_as_their_copies_do(dtype: str, backward: bool) -> None:
    """Columns and rows of a larger matrix are not contiguous."""
    x = draw_samples(0, 6, 24, 0.0)
    for part in (x[:, 8:16], x[2:5, 4:20], x[1:2]):
        found = round_trip(part, dtype, backward=backward)
        assert torch.equal(found, round_trip(part.clone(), dtype, backward=backward))


def test_messages_are_read_at_any_place_of_a_buffer() -> None:
    """The odd byte of a message shifts those behind it."""
    x = draw_samples(0, 3, 16, 0.0)
    for formats in ([Floats("fp32", 16)], make_mixed(x)):
        wire = Wire(formats)
        message = wire.encode(x)[0]
        for place in range(1, 4):
            shifted = torch.cat([message.new_zeros(place), message])[place:]
            assert torch.equal(wire.decode(shifted, 3), wire.decode(message, 3))


def test_nothing_is_sent_of_nothing() -> None:
    for wire in (Wire([]), Wire([Floats("fp32", 3)]), Wire(make_mixed(torch.randn(4, 16)))):
        messages = wire.encode(torch.empty(0, wire.width), 2)
        assert [len(message) for message in messages] == [0, 0]
        assert wire.decode(messages[0], 0).shape == (0, wire.width)
    assert Wire([]).decode(Wire([]).encode(torch.empty(4, 0))[0], 4).shape == (4, 0)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", 96), ("fp16", 50), ("bf16", 48), ("int8", 26), ("fp8", 26)]
)
def test_bytes_of_twenty_four_elements(dtype: str, expected: int) -> None:
    """A scale of two bytes per tower and sample, there and back."""
    for backward in (False, True):
        wire = Wire([make_format(dtype, 24, backward=backward)])
        assert wire.message_bytes(3) == 3 * expected


UNITS = {
    "fp16": (2.0**-11, 2.0**-11),
    "bf16": (2.0**-8, 2.0**-8),
    "int8": (1 / 255, 1 / 255),
    "fp8": (2.0**-4, 2.0**-3),
}
"""Rounding of one element, forward and backward: relative to it, int8 relative to the largest."""
SLACK = 4
"""A logit sums elements of either sign, and is smaller than the largest of them may be."""
CASE: dict[str, Any] = {
    "dtypes": ["fp32", *UNITS],
    "towers": [[[40, 16], [40, 32]], [[40, 16]]],
    "interaction": "cat",
    "rows_per_rank": 32,
}


@pytest.fixture(scope="module")
def outputs(run_ranks: RunRanks) -> list[dict[str, Any]]:
    return run_ranks(2, 1, "compare_wires", **CASE)


@pytest.fixture(scope="module")
def gradients(run_ranks: RunRanks) -> list[dict[str, Any]]:
    """What towers emit travels in a code: only gradients differ, and no ReLU turns over.

    They are as small as if a rank had 131,072 rows, over which they are means.
    """
    factor = 1 / 4096
    modules = [{"kind": "passthrough", "code": {"precision": "int8"}}]
    options = {**CASE, "modules": modules, "loss_factor": factor, "table_lr": 0.5 / factor}
    return run_ranks(2, 1, "compare_wires", **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNITS)
def test_outputs_over_two_hosts_are_near_to_those_in_fp32(
    outputs: list[dict[str, Any]], dtype: str
) -> None:
    """Logits relative to the largest."""
    for found in outputs:
        assert 0 < found[dtype]["logits"] <= SLACK * UNITS[dtype][0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNITS)
def test_gradients_over_two_hosts_are_near_to_those_in_fp32(
    gradients: list[dict[str, Any]], dtype: str
) -> None:
    """What the backward pass moved, relative to its largest; codes are what they are."""
    for found in gradients:
        assert found[dtype]["logits"] == 0
        assert 0 < found[dtype]["moves"] <= SLACK * UNITS[dtype][1]


@pytest.mark.slow
def test_a_step_is_repeatable(outputs: list[dict[str, Any]]) -> None:
    assert [found["fp32"] for found in outputs] == [{"logits": 0, "moves": 0}] * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", COMM_DTYPES)
def test_bytes_do_not_depend_on_the_device(dtype: str, device: str) -> None:
    """fbgemm pads rows to multiples of four on GPUs alone; on meta, shapes are as there."""
    for width in (1, 3, 4, 5, 6, 10, 18):
        x = torch.zeros(3, width, device=device)
        for backward in (False, True):
            form = make_format(dtype, width, backward=backward)
            assert form.pack(x).shape == (3, form.nbytes)
            assert form.unpack(form.pack(x)).shape == (3, width)
            assert Wire([form]).encode(x)[0].shape == (Wire([form]).message_bytes(3),)
        levels = make_levels(torch.rand(4, width), int4=width // 2)
        levels.code.to(device)
        assert levels.pack(x).shape == (3, levels.nbytes)
