"""What crosses hosts: as many bytes as planned, on every device the same."""

from __future__ import annotations

from typing import Final

import torch

from dmt_convert.cluster import Floats, Format, Scaled
from dmt_convert.model import comm_bytes
from dmt_convert.selftest.process import Context
from dmt_convert.selftest.report import Outcome
from dmt_convert.spec import CommDtype

WIDTHS: Final = (4, 6, 8, 10, 16, 33)
_ROWS: Final = 37
# of the largest element: half a step of 8 (bf16), 11, 7 and 3 bits, and the rounded scale
_LIMITS: Final[dict[CommDtype, float]] = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "fp16": 2**-11 + 2**-8,
    "int8": 2**-8 + 2**-8,
    "fp8": 2**-4 + 2**-8,
}


def check_wire(context: Context) -> Outcome:
    """Pack and unpack numbers in every precision."""
    wrong = []
    for dtype in _LIMITS:
        for width in WIDTHS:
            for backward in (False, True):
                made: Format = (
                    Floats(dtype, width)
                    if dtype in ("fp32", "bf16")
                    else Scaled(dtype, width, backward=backward)
                )
                limit = 2 * _LIMITS[dtype] if dtype == "fp8" and backward else _LIMITS[dtype]
                wrong += [
                    f"{dtype}{', backward' * backward}, {width} elements: {text}"
                    for text in compare(made, limit, context.device)
                ]
    if wrong:
        return Outcome(status="differs", line="; ".join(wrong)[:300], details={"wrong": wrong})
    alike = "; the GPU's bytes are the CPU's" if context.device == "cuda" else ""
    line = f"{', '.join(_LIMITS)}: as many bytes as planned, and back{alike}"
    return Outcome(status="ok", line=line, details={"widths": WIDTHS})


def compare(made: Format, limit: float, device: str) -> list[str]:
    """Return what is wrong with a format.

    Args:
        made: It.
        limit: Largest error of what arrives, relative to the largest element of its row.
        device: Where it runs, beside the CPU.
    """
    assert made.dtype is not None
    wrong = []
    x = torch.randn(_ROWS, made.width, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    data = made.pack(x)
    planned = comm_bytes(made.dtype, made.width)
    if data.shape != (_ROWS, planned) or made.nbytes != planned:
        wrong.append(f"{list(data.shape)} bytes, {planned} per sample were planned")
        return wrong
    error = (made.unpack(data) - x).abs() / x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    if not float(error.max()) <= limit:
        wrong.append(f"arrives with an error of {float(error.max()):.2g}, not {limit:.2g}")
    if device == "cuda":
        there = made.pack(x.to(device))
        if not torch.equal(there.cpu(), data):
            wrong.append("a GPU packs other bytes than a CPU")
        if not torch.equal(made.unpack(there).cpu(), made.unpack(data)):
            wrong.append("a GPU unpacks other numbers than a CPU")
    return wrong
