"""Ways to break the engine, to see that the comparisons notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster import FusedTables, cluster_model, sharded_towers, trainer
from dmt_convert.cluster.index_route import IndexRoute
from dmt_convert.cluster.replicated import ReplicatedOptimizer
from dmt_convert.cluster.tower_head import TowerHead
from dmt_convert.model import Head
from dmt_convert.model.tower_modules import LinearTowerModule


@contextmanager
def sabotage(name: str | None) -> Iterator[None]:
    """Break what `name` says for as long as the context lasts."""
    kept: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, attribute: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, attribute)
        kept.append((owner, attribute, original))
        setattr(owner, attribute, make(original))

    if name is not None:
        _PATCHES[name](patch)
    try:
        yield
    finally:
        for owner, attribute, original in kept:
            setattr(owner, attribute, original)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _no_order(patch: Callable[..., None]) -> None:
    """Columns are taken for being in order as they arrive."""

    def settle_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, columns: original(self, range(len(columns)))

    patch(Head, "expect_columns", settle_nothing)


def _still_replicas(patch: Callable[..., None]) -> None:
    """Tables that every rank holds are not moved, as fused optimizers would leave them."""
    patch(ReplicatedOptimizer, "step", lambda original: lambda self: None)


def _parted_replicas(patch: Callable[..., None]) -> None:
    """Every rank moves its copies by another rate."""

    def uneven(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: ReplicatedOptimizer) -> None:
            rate, self.lr = self.lr, self.lr * (1 + 0.01 * dist.get_rank())
            original(self)
            self.lr = rate

        return step

    patch(ReplicatedOptimizer, "step", uneven)


def _swapped_tables(patch: Callable[..., None]) -> None:
    def swapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def list_shards(model: Any) -> list[Any]:
            other = {"t0": "t1", "t1": "t0"}
            return [(other.get(name, name), *rest) for name, *rest in original(model)]

        return list_shards

    from support.cluster import engine_scenarios

    patch(engine_scenarios, "shards_to_fill", swapped)


def _undivided_gradients(patch: Callable[..., None]) -> None:
    """What comes back from the peers is a sum; here it is not made a mean."""

    def without(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: _Multiplied.apply(original(*inputs), 2.0)  # two peers

    patch(TowerHead, "forward", without)


def _wrong_feature(patch: Callable[..., None]) -> None:
    """Two features' ids change places on their way."""

    def swap(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys = features.keys()
        order = list(range(len(keys)))
        a, b = keys.index("f0"), keys.index("f1")
        order[a], order[b] = b, a
        moved = features.permute(order)
        return KeyedJaggedTensor(
            keys=keys,
            values=moved.values(),
            weights=moved.weights_or_none(),
            lengths=moved.lengths(),
            stride=moved.stride(),
        )

    def wrong(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, features: original(self, swap(features))

    patch(IndexRoute, "start", wrong)


def _sums_on_host(patch: Callable[..., None]) -> None:
    """Means of Adagrad's sums are taken over ranks where they were added up."""

    def on_host(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda fused, spec, touched, _: original(fused, spec, touched, torch.device("cpu"))

    patch(trainer, "fill_sums_by_mean", on_host)


def _constants_on_host(patch: Callable[..., None]) -> None:
    """A constant is copied to the device in every step."""

    def copied(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(self: Any, logits: Tensor, batch: Any) -> Tensor:
            return original(self, logits * torch.tensor([1.0], device=logits.device), batch)

        return loss

    patch(trainer.ClusterTrainer, "loss", copied)


class _Alone(nn.Module):
    """Where DistributedDataParallel should be."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def _own_tower_gradients(patch: Callable[..., None]) -> None:
    """Ranks of a host do not bring their tower modules' gradients together."""

    patch(
        sharded_towers,
        "DistributedDataParallel",
        lambda _: lambda **options: _Alone(options["module"]),
    )


def _ranges_of_others(patch: Callable[..., None]) -> None:
    """Levels are read with the ranges of another tower of as many elements."""

    def swapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*inputs: Any) -> Any:
            first, second, *rest = original(*inputs)
            mine, theirs = first.forward, second.forward
            mine.unpack, theirs.unpack = theirs.unpack, mine.unpack
            return [first, second, *rest]

        return choose

    patch(cluster_model, "choose_formats", swapped)


def _rounded_before(patch: Callable[..., None]) -> None:
    """Towers send what is rounded already, to other levels than it travels in."""

    def rounded(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *inputs: torch.round(original(self, *inputs), decimals=2)

    patch(LinearTowerModule, "emit", rounded)


def _ranges_of_one_host(patch: Callable[..., None]) -> None:
    """A host has another copy of the bundle."""

    def changed(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(spec: Any, modules: Any, *rest: Any) -> Any:
            if dist.get_rank() == 0:
                modules[0].code.step.mul_(2)
            return original(spec, modules, *rest)

        return choose

    patch(cluster_model, "choose_formats", changed)


def _same_learning_rate(patch: Callable[..., None]) -> None:
    """Tables with columns of zeros move by the learning rate of the others."""

    def plain(_: Any) -> Callable[..., None]:
        def set_lr(self: FusedTables, lr: float) -> None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()

        return set_lr

    patch(FusedTables, "set_lr", plain)


_PATCHES: dict[str, Callable[[Callable[..., None]], None]] = {
    "no order of columns": _no_order,
    "replicas stay": _still_replicas,
    "replicas part": _parted_replicas,
    "swapped tables": _swapped_tables,
    "undivided gradients": _undivided_gradients,
    "wrong feature": _wrong_feature,
    "sums on the host": _sums_on_host,
    "constants on the host": _constants_on_host,
    "own tower gradients": _own_tower_gradients,
    "same learning rate": _same_learning_rate,
    "ranges of others": _ranges_of_others,
    "ranges of one host": _ranges_of_one_host,
    "rounded before": _rounded_before,
}
