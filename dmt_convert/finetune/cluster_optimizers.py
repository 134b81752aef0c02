"""What moves a model that is spread over ranks.

Letters: P groups of hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmt_convert.data import Batch, IntArray
from dmt_convert.engine import FusedTables, ShardedModel
from dmt_convert.finetune.finetune_config import FinetuneConfig
from dmt_convert.finetune.optimizers import BETAS
from dmt_convert.spec import ModelSpec


class ClusterDenseOptimizer:
    """Adam or SGD over everything but tables; every rank moves its own copies alike.

    Args:
        model: The sharded model.
        config: Kind, learning rate, norm.
    """

    def __init__(self, model: ShardedModel, config: FinetuneConfig) -> None:
        self._named = model.dense_parameters()
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
        """Make Adam's state now, so that a checkpoint finds where to load it."""
        for parameter in self._named.values():
            self._inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Forget all gradients."""
        # in place: data-parallel gradients are views of the buckets that travel
        self._inner.zero_grad(set_to_none=False)

    def step(self, lr_factor: float) -> None:
        """Clip, then move."""
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


class ClusterTableOptimizer:
    """The tables' optimizer: the backward pass moves them, by the learning rate set before.

    Args:
        model: The sharded model.
        config: Learning rate, start of squared gradients.
    """

    def __init__(self, model: ShardedModel, config: FinetuneConfig) -> None:
        self.fused = FusedTables(model)
        self._lr = config.table_lr

    def begin(self, lr_factor: float) -> None:
        """Set what learning rates are multiplied by in the step that comes."""
        self.fused.set_lr(self._lr * lr_factor)

    def state(self) -> Mapping[str, Any]:
        """The state by table, sharded as the tables, for a checkpoint; shares memory."""
        return self.fused.state_dict()


def fill_accumulators(fused: FusedTables, start: float) -> None:
    """Let Adagrad's squared gradients start from a number."""
    for _, state in fused.accumulators():
        state.fill_(start)


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


def fill_accumulators_by_mean(
    fused: FusedTables, spec: ModelSpec, touched: Mapping[str, int]
) -> None:
    """Let Adagrad's squared gradients start, table by table, at their mean over touched rows.

    To be called after one backward pass with a learning rate of 0 from squared gradients of 0,
    which leaves in every touched row its squared gradient. A table without any takes the mean over
    all tables of its dim. The same start as that of one process, see `optimizers.Adagrad`.

    Args:
        fused: The tables' optimizer.
        spec: The flat model.
        touched: Table -> how many of its rows the pass touched, over all ranks.
    """
    names = [each.name for each in spec.tables]
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for table, state in fused.accumulators():
        sums[names.index(table)] += torch.tensor(
            [float(state.sum(dtype=torch.float64)), float(state.numel())], dtype=torch.float64
        )
    device = next((state.device for _, state in fused.accumulators()), torch.device("cpu"))
    sums = sums.to(device)
    dist.all_reduce(sums)
    sums = sums.cpu()
    for i, each in enumerate(spec.tables):  # elements of all rows -> of touched ones
        sums[i, 1] *= touched[each.name] / each.rows
    dims = [each.dim for each in spec.tables]
    for table, state in fused.accumulators():
        index = names.index(table)
        total, count = sums[index]
        if not count:
            same = [i for i, dim in enumerate(dims) if dim == dims[index]]
            total, count = sums[same].sum(dim=0)
        state.fill_(float(total / count) if count else 0.0)
