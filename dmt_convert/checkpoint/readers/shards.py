"""Shards of a tensor: whether they tile it, and what is missing if they do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from dmt_convert.checkpoint.flat_checkpoint import TensorInfo
from dmt_convert.errors import CheckpointError

_MAX_LISTED = 20
_MAX_COMPARED = 5_000_000
"""Pairs of shards with rows in common that are compared; real tables have thousands."""


class Block(Protocol):
    """A part of a tensor."""

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of its first element in the whole tensor."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape."""
        ...


def stand_sorted(names: Iterable[tuple[str, ...]]) -> bool:
    """Tell whether sharded tensors stand in alphabetical order, module by module.

    DistributedModelParallel leaves them so, whatever the order of the tables in the model was.

    Args:
        names: Keys of the sharded tensors, the last one `(module.)table.parameter`.
    """
    modules: dict[tuple[str, ...], list[str]] = {}
    for keys in names:
        *module, table, _ = ("", "", *keys[-1].rsplit(".", 2))[-3:]
        modules.setdefault((*keys[:-1], *module), []).append(table)
    return all(tables == sorted(tables) for tables in modules.values())


def check_tiling(source: Path, name: str, shape: tuple[int, ...], blocks: Sequence[Block]) -> None:
    """Refuse shards that leave a hole or overlap.

    Raises:
        CheckpointError: They do.
        ValueError: One reaches outside the tensor, or has another number of dims; or far too many
            have rows in common.
    """
    covered = 0
    for block in blocks:
        inside = all(
            start + size <= whole
            for start, size, whole in zip(block.starts, block.sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a shard of {name} at {block.starts} reaches outside {shape}")
        covered += math.prod(block.sizes)
    whole = covered == math.prod(shape)
    overlap = whole and _any_overlap(blocks)
    if not whole or overlap:
        raise CheckpointError(
            f"{source}: the {len(blocks)} shards of {name} hold {covered} elements"
            + (", some twice" if overlap else ""),
            expected=f"shards that tile the shape {list(shape)} ({math.prod(shape)} elements)",
            hint="the save did not finish, or files of two saves are mixed",
        )


def _any_overlap(blocks: Iterable[Block]) -> bool:
    """Tell whether two shards share an element; shards far apart in dim 0 are not compared."""
    compared = 0
    solid = sorted((b for b in blocks if math.prod(b.sizes)), key=lambda block: block.starts)
    for i, block in enumerate(solid):
        for later in solid[i + 1 :]:
            if block.starts and later.starts[0] >= block.starts[0] + block.sizes[0]:
                break
            compared += 1
            if compared > _MAX_COMPARED:
                raise ValueError(f"a tensor in {len(solid)} shards of the same rows")
            if _overlaps(block, later):
                return True
    return False


def _overlaps(a: Block, b: Block) -> bool:
    return all(
        sa < sb + nb and sb < sa + na
        for sa, na, sb, nb in zip(a.starts, a.sizes, b.starts, b.sizes, strict=True)
    )


def describe_block(block: Block, shape: tuple[int, ...]) -> str:
    """Say which rows, and columns if they are not all, a shard takes."""
    if not shape:
        return "its one element"
    (row, *other), (rows, *sizes) = block.starts, block.sizes
    text = f"rows {row} to {row + rows - 1}"
    if other and (other[0], sizes[0]) != (0, shape[1]):
        text += f", columns {other[0]} to {other[0] + sizes[0] - 1}"
    return text


def payload_path(folder: Path, name: str) -> Path:
    """Return the path of a payload file that metadata name.

    It may be a symbolic link out of the folder, as in caches that keep blobs apart.

    Raises:
        ValueError: The name itself leads out of the folder.
    """
    inner = Path(name)
    if not name or "\0" in name or inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"a payload outside the directory: {name[:200]!r}")
    return folder / inner


def check_files(folder: Path, tensors: Iterable[TensorInfo], *, expected: str) -> None:
    """Refuse a checkpoint whose payload files are missing or too short.

    Raises:
        CheckpointError: Some are; each is listed.
    """
    ends: dict[Path, int] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            ends[piece.path] = max(ends.get(piece.path, 0), piece.offset + piece.length)
    sizes = {path: path.stat().st_size if path.is_file() else None for path in sorted(ends)}
    details = [
        f"{path.relative_to(folder)}: "
        + ("missing" if size is None else f"{size} bytes, needs {ends[path]}")
        for path, size in sizes.items()
        if size is None or size < ends[path]
    ]
    if details:
        more = len(details) - _MAX_LISTED
        raise CheckpointError(
            f"{folder} lacks {len(details)} of its {len(ends)} payload files",
            expected=expected,
            hint="copy the directory again; every rank's files belong to it",
            details=details[:_MAX_LISTED] + ([f"... and {more} more"] if more > 0 else []),
        )
