"""Adagrad's accumulators of a bundle's tables: into memory, and on into the fine-tuned bundle.

Letters: R rows of a table, N embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from torch import Tensor, from_numpy

from dmt_convert.bundle import (
    AccumulatorSource,
    Bundle,
    FloatRows,
    accumulator_file,
    find_damage,
    read_rows,
)
from dmt_convert.checkpoint import CHUNK_BYTES, TensorInfo, stream_tensor
from dmt_convert.documents import OptimizerState
from dmt_convert.errors import BundleError
from dmt_convert.training.finetune_config import FinetuneConfig

Pieces = Callable[[], Iterator[FloatRows]]
"""Gives the sums of squared gradients of a table, some rows at a time: shape (n, 1) or (n, N)."""
GetSums = Callable[[str], Pieces | None]
"""Gives those of a table by its name; None where there are none."""


def load_sums(info: TensorInfo, target: Tensor) -> None:
    """Read the accumulator of a table.

    Args:
        info: The accumulator, shape (R, 1).
        target: Where to, shape (R, 1), or (R, N): then every element of a row takes the row's.

    Raises:
        BundleError: It holds what no sum of squares can be.
    """
    done = 0
    for piece in read_rows(info, stream_tensor(info)):
        damage = find_damage(piece)
        if damage is not None:
            raise BundleError(
                f"{info.name} in {info.pieces[0].path} holds {damage}",
                expected="sums of squared gradients, as `dmt convert` checked them",
                hint="copy the bundle again, or start without it: --initial-accumulator 0",
            )
        target[done : done + len(piece)] = from_numpy(piece)
        done += len(piece)
    assert done == len(target), (info.name, done, len(target))


def plan_tuned_accumulators(
    parent: Bundle, sums: GetSums | None
) -> dict[str, list[AccumulatorSource]]:
    """List what a fine-tuned bundle holds of the tables' optimizer, by file.

    Args:
        parent: The bundle that was fine-tuned.
        sums: Those of the trained tables; None where the tables are the parent's, as are then
            these.
    """
    get = _stored_sums(parent) if sums is None else sums
    when = "" if sums is None else " after training"
    flat, files = parent.manifest.model.flat, {}
    for t, tower in enumerate(parent.manifest.model.towers):
        tables = dict.fromkeys(flat.table_of(feature).name for feature in tower.features)
        sources = [
            AccumulatorSource(
                table=name,
                rows=flat.table(name).rows,
                pieces=pieces,
                origin=f"the accumulator of table {name!r}{when}",
            )
            for name in tables
            if (pieces := get(name)) is not None
        ]
        if sources:
            files[accumulator_file(t)] = sources
    return files


def describe_tuned(
    parent: Bundle,
    files: Mapping[str, Sequence[AccumulatorSource]],
    config: FinetuneConfig,
    *,
    moved: bool,
) -> OptimizerState:
    """Say for the manifest what a fine-tuned bundle holds of the tables' optimizer.

    Args:
        parent: The bundle that was fine-tuned.
        files: What was written.
        config: How it was trained.
        moved: Whether the tables are other than the parent's.
    """
    if not moved:
        return parent.manifest.optimizer_state
    sources = {source.table: source for group in files.values() for source in group}
    kept = [source for source in sources.values() if source.damage is None]
    notes = [f"as it was after training with {config.table_optimizer}"] if kept else []
    if config.table_optimizer == "adagrad" and kept:
        notes.append("of a number per element, the row's mean is kept")
    notes += [
        f"{source.origin} holds {source.damage}, so it is left out"
        for source in sources.values()
        if source.damage is not None
    ]
    return OptimizerState(
        accumulators=len(kept),
        averaged=len(kept) if config.table_optimizer == "adagrad" else 0,
        notes=(*notes, *dropping_notes(parent, files, moved=moved)),
    )


def dropping_notes(
    parent: Bundle, files: Mapping[str, Sequence[AccumulatorSource]], *, moved: bool
) -> tuple[str, ...]:
    """Say where accumulators of the parent have no successor."""
    if files or not moved or not parent.accumulators:
        return ()
    return (_DROPPED,)


_DROPPED: Final = (
    "training kept no sums of squared gradients: those of the bundle that was fine-tuned no longer "
    "fit the rows, and were dropped"
)


def tensor_pieces(sums: Tensor) -> Pieces:
    """Give sums that are in memory, shape (R, 1) or (R, N)."""
    step = max(1, CHUNK_BYTES // (4 * sums.shape[1]))

    def pieces() -> Iterator[FloatRows]:
        for first in range(0, len(sums), step):
            yield sums[first : first + step].numpy()

    return pieces


def stored_pieces(info: TensorInfo) -> Pieces:
    """Give sums that lie in a file, shape (R,), (R, 1) or (R, N)."""
    return lambda: read_rows(info, stream_tensor(info))


def _stored_sums(bundle: Bundle) -> GetSums:
    given = {name: stored_pieces(info) for name, info in bundle.accumulators.items()}
    return given.get
