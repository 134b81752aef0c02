"""How many rows of a sample are computed at a time: as many as take some 64 MiB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dmt_convert.spec import ModelSpec

_BLOCK_ELEMENTS: Final = 1 << 24
_COPIES: Final = 8
"""Tensors as wide as all embeddings that a forward and backward pass hold at once."""
_LEAST, _MOST = 16, 256


def row_blocks(spec: ModelSpec, rows: int) -> Iterator[slice]:
    """Cut rows into blocks that a model can be run on, forward and backward.

    Dot products of pairs do not count: `Head.pre_activations` bounds them by itself.

    Args:
        spec: The flat model.
        rows: Number of rows.
    """
    step = rows_at_once(spec)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def rows_at_once(spec: ModelSpec) -> int:
    """Rows of a block."""
    return min(_MOST, max(_LEAST, _BLOCK_ELEMENTS // (_COPIES * sum(spec.input_dims))))
