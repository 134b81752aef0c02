"""Train a model that is spread over ranks: the parts that the loop works with.

Letters: B rows of one rank, G rows of a global batch, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.cluster.cluster_accumulators import (
    carry_sums,
    count_touched,
    fill_sums,
    fill_sums_by_mean,
)
from dmt_convert.cluster.cluster_model import ShardedModel
from dmt_convert.cluster.cluster_optimizers import ClusterDenseOptimizer, ClusterTableOptimizer
from dmt_convert.cluster.jagged import JaggedBatch, to_jagged
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.data import Dataset, Share, adapt_shares, deal_batches
from dmt_convert.metrics import Accuracy, measure_accuracy
from dmt_convert.spec import ModelSpec
from dmt_convert.training import FinetuneConfig, training_shares

_EVALUATION_ROWS: Final = 4096
"""Rows of one rank that are measured at once."""


class ClusterTrainer:
    """A sharded model, its optimizers and its rows.

    Args:
        model: The sharded model, with its weights.
        spec: The flat model's spec.
        layout: This rank.
        config: Settings.
        train_rows: Labelled rows to train on.
        valid_rows: Labelled rows to measure on.
    """

    def __init__(
        self,
        model: ShardedModel,
        spec: ModelSpec,
        layout: RankLayout,
        config: FinetuneConfig,
        *,
        train_rows: Dataset,
        valid_rows: Dataset,
    ) -> None:
        self.model, self.spec, self.layout, self.config = model, spec, layout, config
        self._train_rows, self._valid_rows = train_rows, valid_rows
        self._device = torch.device(layout.device)
        self.dense = ClusterDenseOptimizer(model, config)
        self.tables = ClusterTableOptimizer(model, config)
        self._shares: Iterator[Share] = iter(())
        self._next: tuple[JaggedBatch, Share] | None = None
        self._left = 0

    def start_at(self, step: int, total: int) -> None:
        """Set which step comes next, counted from 0, and how many there are in all."""
        self.finish()
        self._shares, self._left = self._open_shares(step), total - step

    def finish(self) -> None:
        """Wait for ids that were sent ahead and are not wanted any more."""
        self.model.towers.forget_input()
        self._next = None

    def _open_shares(self, step: int, *, whole: bool = False) -> Iterator[Share]:
        """Shares from a step on: this rank's, or `whole` batches."""
        return training_shares(
            self._train_rows,
            self.spec,
            self.config,
            rank=0 if whole else self.layout.rank,
            world_size=1 if whole else self.layout.world_size,
            start_step=step,
        )

    def step(self, lr_factor: float) -> float:
        """Take one step.

        Returns:
            This rank's part of the mean loss over the global batch, in nats, times W.
        """
        batch, share = self._next or self._load()
        self.dense.zero_grad()
        self.tables.begin(lr_factor)
        self._left -= 1
        self._next = self._load() if self.config.prefetch and self._left > 0 else None
        if self._next is not None:
            self.model.towers.start_input(self._next[0].sparse)
        loss = self._loss(batch, share)
        if self._next is not None:
            self.model.towers.advance_input()
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            self.dense.step(lr_factor)
        return value

    def _load(self) -> tuple[JaggedBatch, Share]:
        share = next(self._shares)
        return self._put(share), share

    def _put(self, share: Share) -> JaggedBatch:
        return to_jagged(share.batch, self.spec, self._device, weighted=self.model.weighted)

    def _loss(self, batch: JaggedBatch, share: Share) -> Tensor:
        """The mean over ranks of this is the mean over the global batch; copies do not count."""
        assert batch.labels is not None
        logits = self.model(batch)
        if share.counted == len(logits) and share.total == len(logits) * self.layout.world_size:
            return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        each = nn.functional.binary_cross_entropy_with_logits(
            logits, batch.labels, reduction="none"
        )
        counts = torch.arange(len(logits), device=logits.device) < share.counted
        return (each * counts).sum() * (self.layout.world_size / share.total)

    def rehearse(self) -> None:
        """Run the first batch forward and back twice, with a learning rate of 0.

        DistributedDataParallel orders its buckets anew before the third forward pass, and with them
        the sums over more than two ranks: a training that goes on would differ in the last bit from
        one that was not interrupted. And Adagrad's sums are now the squared gradients.
        """
        if self.config.table_optimizer == "adam":
            return  # it would count the steps
        share = next(self._open_shares(0))
        self.tables.begin(0.0)
        for _ in range(2):
            fill_sums(self.tables.fused, self.spec, 0.0)
            self._loss(self._put(share), share).backward()  # type: ignore[no-untyped-call]
        self.dense.zero_grad()

    def start_sums(self, carried: Mapping[str, TensorInfo]) -> None:
        """Set what Adagrad's sums of squared gradients start from, after `rehearse`.

        Args:
            carried: Table -> those that the bundle has, in its files.
        """
        fused, spec = self.tables.fused, self.spec
        if "adagrad" not in self.config.table_optimizer:
            return
        if self.config.initial_accumulator is not None:
            fill_sums(fused, spec, self.config.initial_accumulator)
            return
        if any(table.name not in carried for table in spec.tables):
            whole = next(self._open_shares(0, whole=True)).batch
            fill_sums_by_mean(fused, spec, count_touched(spec, whole))
        if carried:
            carry_sums(fused, spec, carried)

    def measure(self) -> Accuracy:
        """Measure on the validation rows; the same on every rank."""
        self.model.parallel.eval()
        logits, labels = [], []
        with torch.no_grad():
            for share in self._valid_shares():
                batch = self._put(share)
                assert batch.labels is not None
                logits.append(self.model(batch)[: share.counted])
                labels.append(batch.labels[: share.counted])
        self.model.parallel.train()
        return self._agree(torch.cat(logits), torch.cat(labels))

    def _valid_shares(self) -> Iterator[Share]:
        world_size = self.layout.world_size
        shares = deal_batches(
            self._valid_rows,
            _EVALUATION_ROWS * world_size,
            rank=self.layout.rank,
            world_size=world_size,
        )
        return adapt_shares(self._valid_rows, self.spec, shares)

    def _agree(self, logits: Tensor, labels: Tensor) -> Accuracy:
        """Bring all ranks' rows to rank 0, measure there, tell all."""
        counts = [0] * self.layout.world_size
        dist.all_gather_object(counts, len(logits))
        most = max(counts)
        pair = torch.zeros(2, most, device=logits.device)
        pair[0, : len(logits)], pair[1, : len(labels)] = logits, labels
        is_first = self.layout.rank == 0
        gathered = [torch.empty_like(pair) for _ in counts] if is_first else None
        dist.gather(pair, gathered)
        found: list[Accuracy | None] = [None]
        if gathered is not None:
            parts = [part[:, :n] for part, n in zip(gathered, counts, strict=True)]
            joined = torch.cat(parts, dim=1).cpu().numpy()
            found = [_measure(joined[0], joined[1])]
        dist.broadcast_object_list(found)
        assert found[0] is not None
        return found[0]

    def mean_loss(self, losses: Sequence[float]) -> float:
        """Mean of losses over steps and ranks."""
        total = torch.tensor(sum(losses), dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total) / (len(losses) * self.layout.world_size)

    def agree_losses(self, losses: Sequence[float]) -> list[float]:
        """Mean of every loss over all ranks, so that any of them can go on from it."""
        if not losses:
            return []
        each = torch.tensor(losses, dtype=torch.float64, device=self._device)
        dist.all_reduce(each)
        means: list[float] = (each / self.layout.world_size).tolist()
        return means

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds of the model and its optimizers; shares memory."""
        return {
            "model": self.model.state_dict(),
            "dense_optimizer": self.dense.state(),
            "table_optimizer": dict(self.tables.state()),
        }


def _measure(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Accuracy:
    if not np.isfinite(logits).all():
        return Accuracy(auc=None, log_loss=math.nan, ne=None)
    return measure_accuracy(logits, labels)
