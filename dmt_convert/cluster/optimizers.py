"""What moves a model over ranks: an optimizer for dense parts, one that is fused into the tables.

TorchRec fuses the tables' optimizer with the backward pass, and cuts Adagrad's sums of squared
gradients as it cuts the tables: row-wise Adagrad has one number per row and column shard, those of
a column shard one after the other; the others have one number per element.

Letters: R rows of a table or shard, N its columns, k column shards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType  # noqa: F401  registers fbgemm's ops

from dmt_convert.arrays import IntArray
from dmt_convert.bundle import FloatRows, find_damage
from dmt_convert.checkpoint import TensorInfo, gather_rows, read_tensor
from dmt_convert.cluster.cluster_model import ShardedModel, table_of
from dmt_convert.cluster.replicated import EPSILON, REPLICATED, ReplicatedOptimizer
from dmt_convert.config import TableOptimizerKind, TrainingConfig
from dmt_convert.data import Batch
from dmt_convert.errors import BundleError, ConfigError
from dmt_convert.spec import ModelSpec
from dmt_convert.training import BETAS, GetSums, Pieces, stored_pieces

logger = logging.getLogger(__name__)

SUFFIX: Final = ".momentum1"
"""Ends the names of Adagrad's sums in TorchRec's state."""
_CHUNK_ROWS: Final = 1 << 20


def check_tables_optimizer(kind: TableOptimizerKind) -> None:
    """Refuse what ranks cannot train tables with.

    Raises:
        ConfigError: It is Adam. fbgemm has it for GPUs alone, where no training has run it, and
            keeps its step count out of checkpoints: a resumed training would correct its moments
            for the wrong step.
    """
    if kind == "adam":
        raise ConfigError(
            "tables moved by adam over ranks",
            expected="rowwise-adagrad, adagrad or sgd: fbgemm has adam on GPUs alone, where it was "
            "never tested, and a resumed training would not go on from the same step",
            hint="use --table-optimizer rowwise-adagrad, or run one process without torchrun",
        )


def fused_parameters(kind: TableOptimizerKind, *, lr: float) -> dict[str, Any]:
    """Say in fbgemm's words which optimizer moves the tables.

    Args:
        kind: The optimizer.
        lr: Its learning rate.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    kinds = {
        "rowwise-adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "sgd": EmbOptimType.EXACT_SGD,
        "adam": EmbOptimType.ADAM,
    }
    return {"optimizer": kinds[kind], "learning_rate": lr, "eps": EPSILON}


class FusedTables:
    """Learning rate and state of the tables' optimizer.

    Args:
        model: The sharded model.
        kind: The optimizer, as it moves tables that every rank holds.

    Raises:
        ConfigError: It cannot move these.
    """

    def __init__(self, model: ShardedModel, kind: TableOptimizerKind) -> None:
        self.replicated = ReplicatedOptimizer(model.replicated, kind)
        self._optimizer = model.parallel.fused_optimizer
        self._model = model
        # tables whose gradients are multiplied are in kernels of their own
        factors = {
            id(value): model.widths[table_of(name)].factor
            for name, value in self._optimizer.params.items()
        }
        self._factors = [
            factors[id(group["params"][0])] if group["params"] else 1.0
            for group in self._optimizer.param_groups
        ]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; the next backward pass moves tables by it.

        Those that every rank holds are moved by `ClusterDenseOptimizer.step`, by the same rate.
        """
        self.replicated.lr = lr
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr / factor
        self._optimizer.step()  # hands it to the kernels; nothing moves

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter, sharded as the tables are."""
        found: dict[str, dict[str, Any]] = self._optimizer.state_dict()["state"]
        replicated = {
            f"{REPLICATED}.embedding_bags.{table}.weight": {f"{table}{SUFFIX}": sums}
            for table, sums in self.replicated.sums.items()
        }
        return replicated | {
            name: {
                key: self._model.trim({name: value})[name] if _is_per_element(value) else value
                for key, value in state.items()
            }
            for name, state in found.items()
        }


def _is_per_element(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and len(value.size()) == 2


class ClusterDenseOptimizer:
    """Moves what ranks have copies of, all alike.

    That is everything but tables, by Adam or SGD, and the tables that every rank holds, by the
    rule of tables.

    Args:
        model: The sharded model.
        config: Kind, learning rate, norm.
        replicated: What moves those tables.
    """

    def __init__(
        self, model: ShardedModel, config: TrainingConfig, replicated: ReplicatedOptimizer
    ) -> None:
        self._named, self._replicated = model.dense_parameters(), replicated
        self._group = model.towers._cross_pg
        self._lr, self._clip_norm = config.dense_lr, config.clip_norm
        parameters = list(self._named.values())
        self._inner: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=config.dense_lr, betas=BETAS, fused=True)
            if config.dense_optimizer == "adam"
            else torch.optim.SGD(parameters, lr=config.dense_lr)
        )
        if config.dense_optimizer == "adam":
            self._fill()

    def _fill(self) -> None:
        """Make Adam's state now, so that a checkpoint can be loaded into it."""
        for parameter in self._named.values():
            self._inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        # in place: DistributedDataParallel's gradients are views of the buckets that it reduces
        self._inner.zero_grad(set_to_none=False)
        self._replicated.zero_grad()

    def step(self, lr_factor: float) -> None:
        """Move tables by the rate that they were given; clip all else, then move it."""
        self._replicated.step()
        if self._lr == 0:
            return
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        self._inner.param_groups[0]["lr"] = self._lr * lr_factor
        self._inner.step()

    def _clip(self, most: float) -> None:
        """Clip by the norm of the whole model: a rank has only its own towers' modules."""
        device = next(iter(self._named.values())).device
        squares = {"shared": torch.zeros((), device=device), "own": torch.zeros((), device=device)}
        for name, parameter in self._named.items():
            assert parameter.grad is not None
            squares["own" if ".towers." in f".{name}" else "shared"] += (
                parameter.grad.square().sum()
            )
        dist.all_reduce(squares["own"], group=self._group)
        norm = (squares["shared"] + squares["own"]).sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self._named.values():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    def state(self) -> dict[str, Tensor]:
        """The state by name, for a checkpoint; shares memory."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._inner.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sums:
    """The sums of a shard of this rank."""

    table: str
    first: int
    """Its first row."""
    values: Tensor
    """Shape (rows,) or (rows, columns); shares memory."""
    is_copy: bool = False
    """Whether every rank has the same."""


def _shards(fused: FusedTables, spec: ModelSpec) -> Iterator[_Sums]:
    """Yield the sums of this rank's shards."""
    rows = {table.name: table.rows for table in spec.tables}
    for name, state in fused.state_dict().items():
        table = table_of(name)
        for key, value in state.items():
            if key.endswith(SUFFIX) and not isinstance(value, ShardedTensor):
                yield _Sums(table=table, first=0, values=value, is_copy=True)
            elif key.endswith(SUFFIX):
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


def fill_sums_by_mean(
    fused: FusedTables, spec: ModelSpec, touched: Mapping[str, int], device: torch.device
) -> None:
    """Let the sums start, table by table, at their mean over touched rows; all ranks at once.

    To be called after one backward pass with a learning rate of 0 from sums of 0, which leaves in
    every touched row its squared gradient. A table without any takes the mean over all tables of
    its dim. The same start as that of one process, see `optimizers.Adagrad`.

    Args:
        fused: The tables' optimizer.
        spec: The flat model.
        touched: Table -> how many of its rows the pass touched, over all ranks.
        device: This rank's; collectives take no tensors of another, also from ranks without tables.
    """
    names = [table.name for table in spec.tables]
    shards = list(_shards(fused, spec))
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    is_first = dist.get_rank() == 0
    for shard in shards:
        if shard.is_copy and not is_first:  # counted once
            continue
        total, count = float(shard.values.sum(dtype=torch.float64)), float(shard.values.numel())
        sums[names.index(shard.table)] += torch.tensor([total, count], dtype=torch.float64)
    sums = sums.to(device)
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
