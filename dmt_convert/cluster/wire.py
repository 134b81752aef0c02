"""What crosses hosts: float32 becomes bytes, and float32 again.

Letters: B samples, O elements that a tower emits, N bytes of these per sample.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch
from torch import Tensor, nn

from dmt_convert.model import (
    Code,
    CodedModule,
    DmtSpec,
    comm_bytes,
    forward_code,
    gradient_dtype,
)
from dmt_convert.spec import CommDtype

_FLOATS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TINY: Final = torch.finfo(torch.bfloat16).tiny


class Format(ABC):
    """How what a tower emits of a sample travels, or its gradient.

    Attributes:
        width: O.
        nbytes: N.
        dtype: Precision of communication; None: a code's levels.
    """

    width: int
    nbytes: int
    dtype: CommDtype | None = None

    @abstractmethod
    def pack(self, x_BO: Tensor) -> Tensor:
        """Return the bytes of every sample: uint8, shape (B, N)."""

    @abstractmethod
    def unpack(self, data_BN: Tensor) -> Tensor:
        """Return what `pack` was given, as exactly as it travels: float32, shape (B, O)."""


class Floats(Format):
    """Element by element, as fp32 or bf16."""

    def __init__(self, dtype: CommDtype, width: int) -> None:
        self.dtype, self.width, self.nbytes = dtype, width, comm_bytes(dtype, width)
        self._type = _FLOATS[dtype]

    def pack(self, x_BO: Tensor) -> Tensor:
        """See `Format`."""
        return x_BO.to(self._type).contiguous().view(torch.uint8)

    def unpack(self, data_BN: Tensor) -> Tensor:
        """See `Format`."""
        return _view_as(self._type, data_BN).float()


class Scaled(Format):
    """Relative to the largest element of the tower and sample, as fp16, int8 or fp8.

    The scale is rounded to bf16 before it is used, so that it costs no precision. It is NaN if an
    element is not finite: all of that sample arrives as NaN then. fp8 keeps more of the mantissa
    forward (e4m3) and more of the exponent backward (e5m2), as TorchRec's codec does.
    """

    def __init__(self, dtype: CommDtype, width: int, *, backward: bool = False) -> None:
        self.dtype, self.width, self.nbytes = dtype, width, comm_bytes(dtype, width)
        if dtype == "fp8":
            self._type = torch.float8_e5m2 if backward else torch.float8_e4m3fn
            self._top = torch.finfo(self._type).max
        elif dtype == "int8":
            self._type, self._top = torch.int8, 127.0
        else:  # a power of two below the largest: the scale is rounded, maybe down
            self._type, self._top = torch.float16, 2.0**15

    def pack(self, x_BO: Tensor) -> Tensor:
        """See `Format`."""
        largest = x_BO.abs().amax(dim=1, keepdim=True)
        # 0 * inf is NaN
        scale = (largest / self._top + 0 * largest).to(torch.bfloat16)
        # smaller numbers arrive as zeros; a comparison with NaN is false
        scale = torch.where(scale < _TINY, 1.0, scale)
        relative = x_BO / scale.float()
        if self._type is torch.int8:
            relative = relative.round_()
        small = relative.to(self._type).view(torch.uint8)
        return torch.cat([small, scale.view(torch.uint8)], dim=1)

    def unpack(self, data_BN: Tensor) -> Tensor:
        """See `Format`."""
        size = self.width * self._type.itemsize
        small, scale = data_BN.tensor_split([size], dim=1)
        scale = _view_as(torch.bfloat16, scale).float()
        return _view_as(self._type, small).float().mul_(scale)


class Levels(Format):
    """The levels of a tower's code: 8 bits each, then 4 bits, two to a byte."""

    def __init__(self, code: Code) -> None:
        self.code, self.width = code, code.width
        self.nbytes = code.spec.nbytes(code.width)

    def pack(self, x_BO: Tensor) -> Tensor:
        """See `Format`; what is not finite has a level of its own."""
        return self.code.pack(x_BO)

    def unpack(self, data_BN: Tensor) -> Tensor:
        """See `Format`."""
        return self.code.unpack(data_BN)


class Wire:
    """Messages of what some towers emit, or of its gradient.

    A message holds B samples, one after the other. If levels travel in it, one more byte says
    whether a number was not finite; then all of the message arrives as NaN, so that levels do not
    hide that training diverged, and no rank has to ask its device.

    Args:
        formats: Of every tower.
    """

    def __init__(self, formats: Sequence[Format]) -> None:
        self.formats = _join(formats)
        self.width = sum(f.width for f in self.formats)
        self.nbytes = sum(f.nbytes for f in self.formats)
        self.mark_bytes = int(any(isinstance(f, Levels) for f in self.formats))

    @property
    def layout(self) -> tuple[object, ...]:
        """The same of wires that write, and read, in the same way."""
        return tuple(
            f if isinstance(f, Levels) else (type(f), f.dtype, f.width) for f in self.formats
        )

    def message_bytes(self, samples: int) -> int:
        """Bytes of a message; what is empty is not sent."""
        body = self.nbytes * samples
        return body + self.mark_bytes if body else 0

    def encode(self, x: Tensor, parts: int = 1) -> Tensor:
        """Return messages, one after the other.

        Args:
            x: Elements, shape (parts * B, sum of O).
            parts: Messages to make, of B samples each.

        Returns:
            uint8, shape (parts, message_bytes(B)), contiguous.
        """
        if not x.numel():
            return x.new_empty((parts, 0), dtype=torch.uint8)
        widths = [f.width for f in self.formats]
        columns = torch.split(x, widths, dim=1)
        packed = [f.pack(part) for f, part in zip(self.formats, columns, strict=True)]
        rows = (packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)).view(parts, -1)
        if self.mark_bytes:
            # 0, or NaN; `isfinite` takes ten times as long on a CPU
            zeros = (x * 0.0).reshape(parts, -1).sum(dim=1, keepdim=True)
            rows = torch.cat([rows, (zeros != 0).to(torch.uint8)], dim=1)
        return rows

    def decode(self, message: Tensor, samples: int) -> Tensor:
        """Return what a message holds: float32, shape (B, sum of O)."""
        if not message.numel():
            return message.new_empty((samples, self.width), dtype=torch.float32)
        rows = message[: self.nbytes * samples].view(samples, self.nbytes)
        parts = torch.split(rows, [f.nbytes for f in self.formats], dim=1)
        found = [f.unpack(part) for f, part in zip(self.formats, parts, strict=True)]
        x = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return x + torch.where(message[-1:] == 0, 0.0, torch.nan) if self.mark_bytes else x


def _join(formats: Sequence[Format]) -> list[Format]:
    """Treat neighbours whose elements all travel alike as one."""
    joined: list[Format] = []
    for dtype, group in groupby(formats, lambda f: f.dtype if isinstance(f, Floats) else None):
        found = list(group)
        joined += found if dtype is None else [Floats(dtype, sum(f.width for f in found))]
    return joined


def _view_as(dtype: torch.dtype, data: Tensor) -> Tensor:
    data = data.contiguous()
    if data.storage_offset() % dtype.itemsize:  # a part of a buffer of many messages
        data = data.clone()
    return data.view(dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TowerFormat:
    """How what one tower emits travels, there and back."""

    columns: range
    """Its columns of all towers' joint output."""
    forward: Format
    """Of what it emits."""
    backward: Format
    """Of the gradient."""


def choose_formats(
    spec: DmtSpec,
    modules: Sequence[nn.Module],
    comm_dtype: CommDtype | None,
    device: torch.device,
) -> list[TowerFormat]:
    """Choose the format of every tower: its code, or the precision that is asked for.

    Every rank has all towers' modules in memory when it is called, and so the ranges of the codes
    of those that it receives from.

    Args:
        spec: The model.
        modules: Every tower's module.
        comm_dtype: Precision of what has no code, and of all gradients; None: fp32, and that of
            the code.
        device: Where elements are.
    """
    found, first = [], 0
    for tower, module, width in zip(spec.towers, modules, spec.tower_widths, strict=True):
        code = tower.module.code
        found.append(
            TowerFormat(
                columns=range(first, first + width),
                forward=_coded_format(module, device)
                if forward_code(code)
                else _plain_format(comm_dtype or "fp32", width),
                backward=_plain_format(gradient_dtype(code, comm_dtype), width, backward=True),
            )
        )
        first += width
    return found


def _coded_format(module: nn.Module, device: torch.device) -> Format:
    assert isinstance(module, CodedModule) and module.code is not None
    code = module.code
    is_levels = code.spec.precision == "int8"
    return Levels(deepcopy(code).to(device)) if is_levels else Floats("bf16", code.width)


def _plain_format(dtype: CommDtype, width: int, *, backward: bool = False) -> Format:
    return Floats(dtype, width) if dtype in _FLOATS else Scaled(dtype, width, backward=backward)


def make_wires(formats: Sequence[TowerFormat], columns: Sequence[int]) -> tuple[Wire, Wire]:
    """Return the wires, there and back, of towers whose columns one rank sends.

    Args:
        formats: Of all towers.
        columns: The columns, ascending: all of some towers.
    """
    sent = set(columns)
    mine = [f for f in formats if len(f.columns) and f.columns[0] in sent]
    assert [c for f in mine for c in f.columns] == list(columns), "towers are sent whole"
    return Wire([f.forward for f in mine]), Wire([f.backward for f in mine])


def digest_formats(formats: Sequence[TowerFormat]) -> str:
    """Return what has to be the same on all ranks that exchange messages."""
    found = hashlib.sha256()
    for each in formats:
        for way in (each.forward, each.backward):
            found.update(f"{way.dtype} {way.width} {way.nbytes} ".encode())
            if isinstance(way, Levels):
                for values in (way.code.low, way.code.step):
                    found.update(values.cpu().numpy().tobytes())
    return found.hexdigest()
