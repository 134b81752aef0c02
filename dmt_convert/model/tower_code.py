"""How the elements that a tower emits travel between hosts: their precision, and their bytes.

int8 stands for whole numbers with a range per element, found from sampled rows: an element x
travels as the level round((x - low) / step), one of 255, and arrives as low + step * level. Some
elements may take 4 bits, 16 levels. No scale travels.

What has no code (gradients on their way back, and what other towers emit) travels in a precision
of communication: fp16, int8 and fp8 then scale what a tower has of one sample by its largest
element, and the scale travels too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from dmt_convert.errors import ConfigError
from dmt_convert.spec import CommDtype

Precision = Literal["fp32", "bf16", "int8"]
ELEMENT_BYTES: Final[dict[str, int]] = {"fp32": 4, "bf16": 2, "int8": 1}
SCALE_BYTES: Final = 2
"""The scale of one tower and sample travels as bf16."""
_COMM_BYTES: Final[dict[CommDtype, tuple[int, int]]] = {
    "fp32": (4, 0),
    "bf16": (2, 0),
    "fp16": (2, SCALE_BYTES),
    "int8": (1, SCALE_BYTES),
    "fp8": (1, SCALE_BYTES),
}
"""Of an element, and of the scale beside a tower's elements."""
FULL_LEVELS: Final = 255
"""Levels of 8 bits; the one above them stands for what is not finite."""
HALF_LEVELS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerCode:
    """The precision of what a tower emits. A tower without one sends float32."""

    precision: Precision
    """bf16, or int8 with a range per element; fp32 is the same as no code."""
    int4: int = 0
    """int8: elements at the end of what a tower emits that take 4 bits instead of 8."""

    def __post_init__(self) -> None:
        sound = self.precision in ELEMENT_BYTES and self.int4 >= 0
        if not sound or (self.int4 and self.precision != "int8"):
            raise ConfigError(
                f"a tower's code of precision {self.precision!r} with {self.int4} elements of 4 "
                "bits",
                expected=f"{', '.join(ELEMENT_BYTES)}; elements of 4 bits beside int8 alone",
                hint="leave the precision to `dmt convert`",
            )

    def nbytes(self, width: int) -> int:
        """Bytes per sample of `width` elements; two elements of 4 bits share a byte."""
        return ELEMENT_BYTES[self.precision] * (width - self.int4) + (self.int4 + 1) // 2

    def describe(self, width: int) -> str:
        """Say it for people, for example `int8, 12 of 40 elements in 4 bits`."""
        if not self.int4:
            return self.precision
        return f"{self.precision}, {self.int4} of {width} elements in 4 bits"


def comm_bytes(dtype: CommDtype, width: int) -> int:
    """Bytes per sample of `width` elements of one tower that travel without a code."""
    element, scale = _COMM_BYTES[dtype]
    return element * width + scale if width else 0


def element_bytes(dtype: CommDtype) -> int:
    """Bytes of one element in a precision of communication, without the scale beside it."""
    return _COMM_BYTES[dtype][0]


def forward_code(code: TowerCode | None) -> TowerCode | None:
    """Return the code that elements travel in; None: in a precision of communication."""
    return None if code is None or code.precision == "fp32" else code


def gradient_dtype(code: TowerCode | None, asked: CommDtype | None) -> CommDtype:
    """Choose the precision of a tower's gradients: what is asked for, or that of its code."""
    return asked or ("fp32" if code is None else code.precision)
