"""The torch side of a tower's code: what rounding does to values, and the levels that travel.

Letters: B batch, O elements that a tower emits.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from dmt_convert.model.tower_code import FULL_LEVELS, HALF_LEVELS, TowerCode

_BF16_STEP: Final = 2.0**-7
"""Numbers of bf16 are this part of themselves apart, at most."""


class Code(nn.Module):
    """Rounds what a tower emits as its way between hosts does; gradients pass unchanged.

    Args:
        spec: The code.
        width: O.
    """

    low: Tensor
    """int8: value of level 0, shape (O,)."""
    step: Tensor
    """int8: difference between levels, shape (O,), positive."""

    def __init__(self, spec: TowerCode, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        if self.packs:
            # never on the meta device, on which models are built before their weights are read
            self.register_buffer("low", torch.zeros(width, device="cpu"))
            self.register_buffer("step", torch.ones(width, device="cpu"))

    def forward(self, emitted_BO: Tensor) -> Tensor:
        """Return what arrives, shape (B, O)."""
        if torch.is_grad_enabled() and emitted_BO.requires_grad:
            arrived: Tensor = _Rounded.apply(emitted_BO, self)  # type: ignore[no-untyped-call]
            return arrived
        return self.round(emitted_BO)

    def round(self, emitted_BO: Tensor) -> Tensor:
        """Return what arrives, without a gradient; what is not finite arrives as NaN."""
        if self.spec.precision == "fp32":
            return emitted_BO
        if self.spec.precision == "bf16":
            return emitted_BO.to(torch.bfloat16).to(torch.float32)
        return self.low + self.step * self.levels(emitted_BO)

    @property
    def packs(self) -> bool:
        """Whether levels travel, which `pack` puts into bytes."""
        return self.spec.precision == "int8"

    def pack(self, emitted_BO: Tensor) -> Tensor:
        """int8: the bytes that travel, uint8, shape (B, `spec.nbytes(O)`).

        A level of 8 bits is a byte. Of h = ceil(n / 2) bytes with n levels of 4 bits, byte i holds
        level i in its low half and level h + i in its high half. What is not finite travels as a
        level of its own in 8 bits, and as any level in 4: a tower has elements of 8 bits too.
        """
        levels, whole = self._nearest(emitted_BO), self.width - self.spec.int4
        levels = torch.where(_zero_if_finite(emitted_BO) == 0, levels, float(FULL_LEVELS))
        if self.spec.int4:
            half = (self.spec.int4 + 1) // 2
            halves = levels[:, whole:].clamp(max=HALF_LEVELS - 1)
            low, high = halves[:, :half], halves[:, half:]
            high = nn.functional.pad(high, (0, 2 * half - self.spec.int4))
            levels = torch.cat([levels[:, :whole], low + HALF_LEVELS * high], dim=1)
        return levels.to(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return what arrives, shape (B, O), from what `pack` gave."""
        levels, whole = packed.to(torch.float32), self.width - self.spec.int4
        if self.spec.int4:
            high = torch.floor(levels[:, whole:] / HALF_LEVELS)
            low = levels[:, whole:] - HALF_LEVELS * high
            pairs = torch.cat([low, high], dim=1)[:, : self.spec.int4]
            levels = torch.cat([levels[:, :whole], pairs], dim=1)
        # 0 / 0 is NaN; comparing and choosing takes five times as long on a CPU
        not_finite = 0.0 / (FULL_LEVELS - levels)
        return self.low + self.step * levels + not_finite

    def spacing(self, arrived_BO: Tensor) -> Tensor:
        """Return at most how far the levels beside what arrived are from it, shape (B, O)."""
        if self.spec.precision == "bf16":
            return arrived_BO.abs() * _BF16_STEP
        if self.spec.precision == "int8":
            return self.step.expand_as(arrived_BO)
        return torch.zeros_like(arrived_BO)

    def levels(self, emitted_BO: Tensor) -> Tensor:
        """int8: the levels that travel, as whole numbers in float32, or NaN, shape (B, O)."""
        return self._nearest(emitted_BO) + _zero_if_finite(emitted_BO)

    def _nearest(self, emitted_BO: Tensor) -> Tensor:
        """Levels of numbers that are finite."""
        levels = torch.round((emitted_BO - self.low) / self.step)
        if not self.spec.int4:
            return levels.clamp(0, FULL_LEVELS - 1)
        whole = self.width - self.spec.int4
        parts = [levels[:, :whole].clamp(0, FULL_LEVELS - 1)]
        parts.append(levels[:, whole:].clamp(0, HALF_LEVELS - 1))
        return torch.cat(parts, dim=1)


def _zero_if_finite(x: Tensor) -> Tensor:
    """Return 0 for what is finite, else NaN: one pass, where `isfinite` and `where` take many."""
    return x * 0.0


class _Rounded(torch.autograd.Function):
    """Rounds; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(_: Any, emitted_BO: Tensor, code: Code) -> Tensor:
        return code.round(emitted_BO)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
