"""Adagrad's accumulators of squared gradients in a bundle, from which its training goes on.

One number per row of a table, float32. Where a checkpoint holds one per element, the row's mean is
taken: what row-wise Adagrad would have gathered from the same gradients.

Letters: R rows of a table, N its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.checkpoint import (
    CHUNK_BYTES,
    ZEROS,
    ByteRows,
    TensorInfo,
    find_outlier,
    to_fp32,
)
from dmt_convert.documents import OptimizerState
from dmt_convert.errors import CheckpointError
from dmt_convert.families import FlatModelInfo
from dmt_convert.files import StreamedFile, TensorSource, stream_checked

FloatRows = npt.NDArray[np.float32]
_ITEM: Final = 4
_PREFIX: Final = "tables."
_SUFFIX: Final = ".accumulator"
_ABSURD_RATIO, _ABSURD_FLOOR = 1e12, 1e6
"""Sums of squares differ more than weights do: that of a row that every batch reads may be millions
of times those of the others."""


def accumulator_file(index: int) -> str:
    """Name of a tower's accumulators below the bundle."""
    return f"weights/accumulators_{index:03d}.safetensors"


def accumulator_name(table: str) -> str:
    """Name of a table's accumulator in its file."""
    return f"{_PREFIX}{table}{_SUFFIX}"


def accumulated_table(name: str) -> str:
    """Table whose accumulator bears a name: the way back of `accumulator_name`."""
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


@dataclass(slots=True, kw_only=True, eq=False)
class AccumulatorSource:
    """The accumulator of a table, to be written."""

    table: str
    """The table."""
    rows: int
    """Its rows."""
    pieces: Callable[[], Iterator[FloatRows]]
    """Gives the accumulator from the first row on, some rows at a time: shape (n, 1) or (n, N)."""
    origin: str
    """What to call it in errors."""
    damage: str | None = None
    """What it holds that no sum of squares can be; known once it was streamed."""

    @property
    def nbytes(self) -> int:
        """Size in the bundle, in bytes."""
        return self.rows * _ITEM

    def tensor(self) -> TensorSource:
        """Describe it as a tensor of shape (R, 1), so that single rows can be gathered."""
        return TensorSource(
            name=accumulator_name(self.table),
            dtype="fp32",
            shape=(self.rows, 1),
            chunks=self._stream,
            origin=self.origin,
        )

    def _stream(self) -> Iterator[ByteRows]:
        """Yield the row-wise accumulator; behind a damage zeros, since it is left out then."""
        left = self.nbytes
        for piece in self.pieces():
            self.damage = find_damage(piece)
            if self.damage is not None:
                break
            means = piece if piece.shape[1] == 1 else piece.mean(axis=1, dtype=np.float64)
            chunk = np.ascontiguousarray(means, dtype=np.float32).reshape(-1).view(np.uint8)
            left -= chunk.nbytes
            yield chunk
        while self.damage is not None and left:
            chunk = ZEROS[:left] if left < CHUNK_BYTES else ZEROS
            left -= chunk.nbytes
            yield chunk


def find_damage(values: FloatRows) -> str | None:
    """Say what a piece of an accumulator holds that no sum of squares can be."""
    if not values.size:
        return None
    least, most = float(values.min()), float(values.max())
    if math.isnan(least):
        return "NaN"
    if least < 0:
        return "negative numbers"
    if math.isinf(most):
        return "Inf"
    outlier = find_outlier(values, ratio=_ABSURD_RATIO, floor=_ABSURD_FLOOR)
    return None if outlier is None else f"an absurd value, {outlier.describe()}"


def plan_accumulator_files(
    info: FlatModelInfo, towers: Sequence[Sequence[str]]
) -> dict[str, list[AccumulatorSource]]:
    """List the accumulators that a checkpoint holds, by the file of their tower.

    Args:
        info: The flat checkpoint; they are streamed from it.
        towers: Features of every tower. One whose tables have no accumulator has no file.
    """
    found, tables = info.accumulators, info.spec.tables_by_feature
    files = {}
    for t, features in enumerate(towers):
        names = dict.fromkeys(tables[feature].name for feature in features)
        sources = [_checkpoint_source(name, found[name]) for name in names if name in found]
        if sources:
            files[accumulator_file(t)] = sources
    return files


def accumulator_bytes(info: FlatModelInfo) -> int:
    """Bytes that the accumulators of a checkpoint take in a bundle."""
    return sum(state.shape[0] for state in info.accumulators.values()) * _ITEM


def _checkpoint_source(table: str, state: TensorInfo) -> AccumulatorSource:
    origin = f"the accumulator of table {table!r} ({state.path})"

    def pieces() -> Iterator[FloatRows]:
        try:
            yield from read_rows(state, stream_checked(state, origin))
        except CheckpointError as error:
            raise CheckpointError(
                error.found,
                expected=error.expected,
                hint=f"{error.hint}; or leave it out with --optimizer-state drop",
                details=error.details,
            ) from None

    return AccumulatorSource(table=table, rows=state.shape[0], pieces=pieces, origin=origin)


def read_rows(info: TensorInfo, chunks: Iterator[ByteRows]) -> Iterator[FloatRows]:
    """Cut the bytes of a tensor into whole rows.

    Args:
        info: A tensor of shape (R,) or (R, N), of a float dtype.
        chunks: Its bytes, row-major, in pieces of any size.

    Yields:
        Rows as float32, shape (n, 1) or (n, N). What float32 does not hold is infinite.
    """
    row_bytes = info.nbytes // max(1, info.shape[0])
    rest = np.empty(0, dtype=np.uint8)
    for raw in chunks:
        rest = np.concatenate([rest, raw])
        whole = rest[: len(rest) - len(rest) % row_bytes]
        rest = rest[len(whole) :]
        if len(whole):
            with np.errstate(over="ignore"):
                yield to_fp32(whole.reshape(-1, row_bytes), info.dtype)


def write_accumulators(
    path: Path,
    sources: Sequence[AccumulatorSource],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write the accumulators of a tower but for those that turn out to be damaged.

    Args:
        path: Where to; must not exist. Nothing is written where all are damaged.
        sources: The accumulators; `damage` is set of those that were left out.
        metadata: Strings for the header.
        on_bytes: Told of every written piece, for progress.

    Returns:
        Tensor name -> digest.

    Raises:
        CheckpointError: The bytes of one are not what its checksum says.
        OSError: The disk is full, or fails.
    """
    kept = list(sources)
    while kept:  # twice at most: a damage is found while the file is being written
        file = StreamedFile(path, [source.tensor() for source in kept], metadata=metadata)
        file.write_large(on_bytes)
        sound = [source for source in kept if source.damage is None]
        if len(sound) == len(kept):
            return file.finish()
        path.unlink()
        kept = sound
    return {}


def describe_accumulators(
    info: FlatModelInfo, files: Mapping[str, Sequence[AccumulatorSource]], *, keep: bool
) -> OptimizerState:
    """Say for the manifest what became of the optimizer state of a checkpoint's tables.

    Args:
        info: The flat checkpoint.
        files: What was written of it.
        keep: Whether it was to be kept.
    """
    state, found = info.row_state, info.accumulators
    sources = {source.table: source for group in files.values() for source in group}
    kept = [name for name, source in sources.items() if source.damage is None]
    averaged = [name for name in kept if found[name].shape[1:] not in ((), (1,))]
    return OptimizerState(
        accumulators=len(kept),
        averaged=len(averaged),
        notes=tuple(_notes(state, found, sources, len(averaged), keep=keep)),
    )


def _notes(
    state: Mapping[str, TensorInfo],
    found: Mapping[str, TensorInfo],
    sources: Mapping[str, AccumulatorSource],
    averaged: int,
    *,
    keep: bool,
) -> list[str]:
    notes = []
    if state and not keep:
        notes.append(f"the optimizer state of {_tables(len(state))} was dropped, as asked for")
    others = len(state) - len(found)
    if others and keep:
        notes.append(
            f"the optimizer state of {_tables(others)} is Adam's and is not carried: its mean of "
            "squared gradients decays, so it is no sum from which Adagrad could go on"
        )
    if averaged:
        notes.append(
            f"{_tables(averaged)} had an accumulator per element: the row's mean is kept, as "
            "row-wise Adagrad holds it"
        )
    notes += [
        f"{source.origin} holds {source.damage}, so it is left out: training starts that table's "
        "anew"
        for source in sources.values()
        if source.damage is not None
    ]
    return notes


def _tables(count: int) -> str:
    return f"{count} table" + ("" if count == 1 else "s")
