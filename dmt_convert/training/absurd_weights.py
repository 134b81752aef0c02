"""Weights that are absurd: NaN, infinite, or huge against the rest of their tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

_ABSURD: Final = 1e6
"""A weight is absurd if it is so much larger than the median of its tensor, and than 1."""
_CHUNK_ELEMENTS: Final = 1 << 22
_MAX_NAMED: Final = 5


def name_absurd(tensors: Iterable[tuple[str, Tensor]], *, first_row: int = 0) -> Iterator[str]:
    """Say which tensors hold absurd weights, and where the worst one is; a line each.

    Args:
        tensors: Their names and values.
        first_row: What their first row is called: shards of tables begin somewhere.
    """
    for name, tensor in tensors:
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        values = tensor.detach()
        size, place = _largest(values)
        if size <= _ABSURD * max(1.0, _median(values)):
            continue
        row = place // max(1, values[0].numel()) if values.dim() > 1 else place
        yield f"{name}, row {first_row + row}: {float(values.flatten()[place]):.4g}"


def join_causes(found: Iterable[str]) -> list[str]:
    """Return the lines to be shown: each once, and not too many."""
    lines = list(dict.fromkeys(found))
    more = len(lines) - _MAX_NAMED
    return lines[:_MAX_NAMED] + ([f"and {more} more"] if more > 0 else [])


def _largest(values: Tensor) -> tuple[float, int]:
    """The largest size of a weight, NaN being larger than any, and where it is."""
    flat, best, place = values.reshape(-1), -1.0, 0
    for begin in range(0, len(flat), _CHUNK_ELEMENTS):
        part = flat[begin : begin + _CHUNK_ELEMENTS].float().abs()
        part = torch.nan_to_num(part, nan=torch.inf, posinf=torch.inf)
        size, index = part.max(dim=0)
        if float(size) > best:
            best, place = float(size), begin + int(index)
    return best, place


def _median(values: Tensor) -> float:
    """Of the sizes of weights, on at most a chunk of them."""
    flat = values.reshape(-1)
    step = max(1, len(flat) // _CHUNK_ELEMENTS)
    return float(torch.nan_to_num(flat[::step].float().abs(), nan=0.0, posinf=0.0).median())
