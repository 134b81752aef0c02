"""What moves a model that is spread over ranks.

Letters: P groups of hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmt_convert.cluster.cluster_model import ShardedModel
from dmt_convert.cluster.table_optimizer import FusedTables
from dmt_convert.training import BETAS, FinetuneConfig


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
