"""Adagrad's sums of squared gradients over ranks: where they start, and on into a new bundle.

TorchRec keeps them as it cuts the tables: of row-wise Adagrad one number per row and column shard,
those of a column shard one after the other; else one per element.

Letters: R rows of a table, N its columns, k column shards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmt_convert.arrays import IntArray
from dmt_convert.bundle import FloatRows, find_damage
from dmt_convert.checkpoint import TensorInfo, gather_rows, read_tensor
from dmt_convert.cluster.table_optimizer import FusedTables
from dmt_convert.data import Batch
from dmt_convert.errors import BundleError
from dmt_convert.spec import ModelSpec
from dmt_convert.training import GetSums, Pieces, stored_pieces

logger = logging.getLogger(__name__)

SUFFIX: Final = ".momentum1"
"""Ends the names of the sums in TorchRec's state."""
_CHUNK_ROWS: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sums:
    """The sums of a shard of this rank."""

    table: str
    first: int
    """Its first row."""
    values: Tensor
    """Shape (rows,) or (rows, columns); shares memory."""


def _shards(fused: FusedTables, spec: ModelSpec) -> Iterator[_Sums]:
    """Yield the sums of this rank's shards."""
    rows = {table.name: table.rows for table in spec.tables}
    for name, state in fused.state_dict().items():
        table = name.rsplit(".embedding_bags.", 1)[-1].removesuffix(".weight")
        for key, value in state.items():
            if key.endswith(SUFFIX):
                for shard in value.local_shards():
                    first = int(shard.metadata.shard_offsets[0]) % rows[table]
                    yield _Sums(table=table, first=first, values=shard.tensor)


def fill_sums(fused: FusedTables, spec: ModelSpec, start: float) -> None:
    """Let all sums start from a number."""
    for shard in _shards(fused, spec):
        shard.values.fill_(start)


def carry_sums(fused: FusedTables, spec: ModelSpec, carried: Mapping[str, TensorInfo]) -> None:
    """Let the sums of some tables go on from what a bundle holds.

    Args:
        fused: The tables' optimizer.
        spec: The flat model.
        carried: Table -> its sums in a file, shape (R, 1); with one number per element, every
            element of a row takes the row's.

    Raises:
        BundleError: One holds what no sum of squares can be.
    """
    for shard in _shards(fused, spec):
        info = carried.get(shard.table)
        if info is None:
            continue
        count = len(shard.values)
        for done in range(0, count, _CHUNK_ROWS):
            rows = np.arange(done, min(count, done + _CHUNK_ROWS))
            piece = gather_rows(info, shard.first + rows)
            damage = find_damage(piece)
            if damage is not None:
                raise BundleError(
                    f"{info.name} in {info.pieces[0].path} holds {damage}",
                    expected="sums of squared gradients, as `dmt convert` checked them",
                    hint="copy the bundle again, or start without it: --initial-accumulator 0",
                )
            target = shard.values[done : done + len(rows)]
            target.copy_(torch.from_numpy(piece).reshape(-1, *[1] * (target.dim() - 1)))
    logger.info("Adagrad goes on from the accumulators of %s tables", len(carried))


def count_touched(spec: ModelSpec, batch: Batch) -> dict[str, int]:
    """Count the different rows that a batch touches, table by table.

    Args:
        spec: The flat model.
        batch: All rows of a step, over all ranks.
    """
    ids: dict[str, list[IntArray]] = {table.name: [] for table in spec.tables}
    for feature, bag in zip(spec.features, batch.bags, strict=True):
        ids[feature.table].append(bag.values)
    return {
        table: len(np.unique(np.concatenate(parts))) if parts else 0 for table, parts in ids.items()
    }


def fill_sums_by_mean(fused: FusedTables, spec: ModelSpec, touched: Mapping[str, int]) -> None:
    """Let the sums start, table by table, at their mean over touched rows; all ranks at once.

    To be called after one backward pass with a learning rate of 0 from sums of 0, which leaves in
    every touched row its squared gradient. A table without any takes the mean over all tables of
    its dim. The same start as that of one process, see `optimizers.Adagrad`.

    Args:
        fused: The tables' optimizer.
        spec: The flat model.
        touched: Table -> how many of its rows the pass touched, over all ranks.
    """
    names = [table.name for table in spec.tables]
    shards = list(_shards(fused, spec))
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for shard in shards:
        total, count = float(shard.values.sum(dtype=torch.float64)), float(shard.values.numel())
        sums[names.index(shard.table)] += torch.tensor([total, count], dtype=torch.float64)
    sums = sums.to(shards[0].values.device if shards else "cpu")
    dist.all_reduce(sums)
    sums = sums.cpu()
    for i, table in enumerate(spec.tables):  # numbers of all rows -> of touched ones
        sums[i, 1] *= touched[table.name] / table.rows
    dims = [table.dim for table in spec.tables]
    for shard in shards:
        index = names.index(shard.table)
        total_and_count = sums[index]
        if not total_and_count[1]:
            same = [i for i, dim in enumerate(dims) if dim == dims[index]]
            total_and_count = sums[same].sum(dim=0)
        total, count = total_and_count.tolist()
        shard.values.fill_(total / count if count else 0.0)


def saved_sums(stored: Mapping[str, TensorInfo], spec: ModelSpec) -> GetSums:
    """Find the sums of a training checkpoint.

    Args:
        stored: Name -> tensor of the checkpoint.
        spec: The flat model.
    """
    rows = {table.name: table.rows for table in spec.tables}
    found: dict[str, Pieces] = {}
    for name, info in stored.items():
        table = name.removesuffix(SUFFIX).rsplit(".", 1)[-1]
        if not name.endswith(SUFFIX) or table not in rows:
            continue
        shards = info.shape[0] // rows[table]
        found[table] = stored_pieces(info) if shards == 1 else _mean_pieces(info, rows[table])
    return found.get


def _mean_pieces(info: TensorInfo, rows: int) -> Pieces:
    return lambda: iter([mean_sums(info, rows)])


def mean_sums(info: TensorInfo, rows: int) -> FloatRows:
    """Read the sums of row-wise Adagrad, shape (k * R,), as their mean over column shards.

    Every shard's is the mean of squares over its own columns, and all have the same width.

    Returns:
        Shape (R, 1).
    """
    each = np.asarray(read_tensor(info), dtype=np.float32).reshape(-1, rows)
    mean: FloatRows = each.mean(axis=0).reshape(-1, 1)
    return mean
