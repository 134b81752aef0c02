"""What moves the weights: one optimizer per part of the model.

Letters: R rows of all tables of one dim, N embedding dim, U rows that a batch touches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor, from_numpy, nn

from dmt_convert.bundle import find_damage, read_rows
from dmt_convert.checkpoint import TensorInfo, stream_tensor
from dmt_convert.config import TrainingConfig
from dmt_convert.errors import BundleError
from dmt_convert.placement import STATE_PER_ELEMENT, STATE_PER_ROW, optimizer_in_plan
from dmt_convert.training.tables import TableGroup, TableStore

logger = logging.getLogger(__name__)

EPSILON: Final = 1e-8
"""Added to the root of squared gradients, as in TorchRec's row-wise Adagrad."""
BETAS: Final = (0.9, 0.999)
"""Of Adam."""


class PartOptimizer(Protocol):
    """Moves one part of a model; parts of a distributed model have others of this kind."""

    def zero_grad(self) -> None:
        """Set all gradients to zero."""

    def step(self, lr_factor: float) -> None:
        """Move the weights by their gradients.

        Args:
            lr_factor: What the learning rate is multiplied by in this step.
        """


class DenseOptimizer:
    """Adam or SGD over everything but tables, with the gradient's norm clipped.

    Args:
        parameters: What is moved.
        config: Kind, learning rate and norm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainingConfig) -> None:
        self._parameters = list(parameters)
        self._lr, self._clip_norm = config.dense_lr, config.clip_norm
        for parameter in self._parameters:
            parameter.requires_grad_(config.dense_lr > 0)
        self._inner: torch.optim.Optimizer = (
            torch.optim.Adam(self._parameters, lr=config.dense_lr, betas=BETAS, fused=True)
            if config.dense_optimizer == "adam"
            else torch.optim.SGD(self._parameters, lr=config.dense_lr)
        )

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self._inner.zero_grad()

    def step(self, lr_factor: float) -> None:
        """Clip, then move."""
        if self._lr == 0:
            return
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._inner.param_groups[0]["lr"] = self._lr * lr_factor
        self._inner.step()


class RowRule(Protocol):
    """How touched rows are moved; state lies beside every row."""

    def update(self, index: int, weight: Tensor, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """Move rows of a group.

        Args:
            index: The group.
            weight: Its rows, shape (R, N).
            rows: Those touched, shape (U,), each once.
            gradient: Their gradients, shape (U, N).
            lr: Learning rate.
        """


class TableOptimizer:
    """Moves the rows that a batch touched, and no others.

    Args:
        store: The tables.
        config: Kind of optimizer and learning rate.
    """

    def __init__(self, store: TableStore, config: TrainingConfig) -> None:
        self._store, self._lr = store, config.table_lr
        self._rule = make_rule(store, config)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self._store.forget_gradients()

    def step(self, lr_factor: float) -> None:
        """Move the rows that were looked up since `zero_grad`."""
        if self._lr == 0:
            return
        with torch.no_grad():
            for index, rows, gradient in self._store.gradients():
                self._store.note_update(index, rows)
                weight = self._store.groups[index].weight
                self._rule.update(index, weight, rows, gradient, self._lr * lr_factor)


def make_rule(store: TableStore, config: TrainingConfig) -> RowRule:
    """Make the rule that a config names; what an earlier one summed is forgotten."""
    store.forget_sums()
    kind = config.table_optimizer
    if kind == "sgd":
        return Sgd()
    if kind == "adam":
        return Adam(store)
    return Adagrad(store, rowwise=kind == "rowwise-adagrad", start=config.initial_accumulator)


class Sgd:
    """w -= lr * g."""

    def update(self, index: int, weight: Tensor, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """Move rows; see `RowRule`."""
        _subtract(weight, rows, gradient * lr)


class Adagrad:
    """s += g^2 (row-wise: its mean over the row), w -= lr * g / (sqrt(s) + 1e-8).

    By default s goes on from the accumulators that the tables come with. That of a table without
    any starts at the mean of the squared gradients of the rows that the first batch touches: as if
    each row had been touched once before. From zero, the first step of every row would have the
    full learning rate, however small its gradient.

    Args:
        store: The tables; s lies in it.
        rowwise: One s per row, instead of one per element.
        start: Where s starts; None: as above.

    Raises:
        BundleError: An accumulator in a file is damaged.
    """

    def __init__(self, store: TableStore, *, rowwise: bool, start: float | None) -> None:
        self._rowwise, self._groups = rowwise, store.groups
        for group in store.groups:
            width = 1 if rowwise else group.weight.shape[1]
            group.sums = torch.full((len(group.weight), width), start or 0.0)
            known = set(group.starts)
            if start is None:
                known &= set(store.accumulators)
            group.summed = group.kept_summed = frozenset(known)
            for name in known if start is None else ():
                first, rows = group.starts[name], store.spec.table(name).rows
                load_sums(store.accumulators[name], group.sums[first : first + rows])
        if start is None and store.accumulators:
            logger.info(
                "Adagrad goes on from the accumulators of %s tables", len(store.accumulators)
            )

    def update(self, index: int, weight: Tensor, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """Move rows; see `RowRule`."""
        squared = gradient.square()
        if self._rowwise:
            squared = squared.mean(dim=1, keepdim=True)
        group = self._groups[index]
        state = group.sums
        assert state is not None
        if len(group.summed) < len(group.starts):
            _fill_tables(group, state, rows, squared)
            group.summed = frozenset(group.starts)
        accumulated = state.index_select(0, rows).add_(squared)
        state.index_copy_(0, rows, accumulated)
        _subtract(weight, rows, gradient * (lr / accumulated.sqrt().add_(EPSILON)))


def _subtract(weight: Tensor, rows: Tensor, change: Tensor) -> None:
    # as rows occur once, they can be copied: several times as fast as index_add_
    weight.index_copy_(0, rows, weight.index_select(0, rows).sub_(change))


def _fill_tables(group: TableGroup, state: Tensor, rows: Tensor, squared: Tensor) -> None:
    """Fill the state of tables that have none with the mean of the squared gradients met so far.

    A table without any takes the mean over all.
    """
    names = sorted(group.starts, key=lambda name: group.starts[name])
    edges = [*(group.starts[name] for name in names), len(state)]
    table_of = torch.bucketize(rows, torch.tensor(edges[1:]), right=True)
    for table, (first, last) in enumerate(pairwise(edges)):
        if names[table] in group.summed:
            continue
        own = squared[table_of == table]
        state[first:last] = (own if len(own) else squared).mean()


class Adam:
    """Adam on the touched rows alone, as `torch.optim.SparseAdam`: others keep their moments.

    Args:
        store: The tables.
    """

    def __init__(self, store: TableStore) -> None:
        self._moments = [
            (torch.zeros_like(group.weight), torch.zeros_like(group.weight))
            for group in store.groups
        ]
        self._steps = [0] * len(store.groups)

    def update(self, index: int, weight: Tensor, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """Move rows; see `RowRule`."""
        self._steps[index] += 1
        step, (beta1, beta2) = self._steps[index], BETAS
        first, second = self._moments[index]
        mean = first.index_select(0, rows).lerp_(gradient, 1 - beta1)
        square = second.index_select(0, rows).lerp_(gradient.square(), 1 - beta2)
        first.index_copy_(0, rows, mean)
        second.index_copy_(0, rows, square)
        scale = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        _subtract(weight, rows, scale * mean / square.sqrt().add_(EPSILON))


def state_bytes(config: TrainingConfig, rows: int, elements: int) -> int:
    """Bytes of the state that a config's table optimizer keeps, wherever it starts from.

    Args:
        config: Kind of optimizer.
        rows: Rows of all tables.
        elements: Elements of all tables.
    """
    kind = optimizer_in_plan(config.table_optimizer)
    return rows * STATE_PER_ROW[kind] + elements * STATE_PER_ELEMENT[kind]


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
