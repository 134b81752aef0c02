"""What the loop over ranks works with: batches, the loss, optimizers, the measurement.

Letters: B rows of one rank, G rows of a global batch, W ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmt_convert.arrays import FloatArray, IntArray
from dmt_convert.checkpoint import TensorInfo
from dmt_convert.cluster.cluster_model import ShardedModel
from dmt_convert.cluster.index_route import JaggedBatch, to_jagged
from dmt_convert.cluster.optimizers import (
    ClusterDenseOptimizer,
    FusedTables,
    carry_sums,
    count_touched,
    fill_sums,
    fill_sums_by_mean,
)
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.cluster.sharding import table_shards
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Dataset, Share, adapt_shares, deal_batches
from dmt_convert.metrics import Accuracy, measure_accuracy
from dmt_convert.spec import ModelSpec
from dmt_convert.training import Progress, Teacher, loss_blocks, name_absurd, training_shares

READ_EVERY: Final = 50
"""Steps whose losses are read from a GPU together."""
_EVALUATION_ROWS: Final = 4096
"""Rows of one rank that are measured at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankBatch:
    """This rank's rows of a global batch."""

    inputs: JaggedBatch
    """What the model takes, on this rank's device."""
    share: Share
    """Which rows they are, and how many of them count."""


class ClusterTrainer:
    """A sharded model, its optimizers and its rows.

    `recipes/finetune_dmt.py` takes a step with it.

    Args:
        model: The sharded model, with its weights.
        spec: The flat model's spec.
        layout: This rank.
        config: Settings.
        train_rows: Labelled rows to train on.
        valid_rows: Labelled rows to measure on.
        teacher: What teaches beside the labels; None: nothing does.
    """

    def __init__(
        self,
        model: ShardedModel,
        spec: ModelSpec,
        layout: RankLayout,
        config: TrainingConfig,
        *,
        train_rows: Dataset,
        valid_rows: Dataset,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.spec, self.layout, self.config = model, spec, layout, config
        self._train_rows, self._valid_rows, self._teacher = train_rows, valid_rows, teacher
        self._device = model.transport.device
        self.tables = FusedTables(model, config.table_optimizer)
        self.dense = ClusterDenseOptimizer(model, config, self.tables.replicated)
        self._shares: Iterator[Share] = iter(())
        self._next: RankBatch | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._left = 0

    def start_at(self, step: int, total: int) -> None:
        """Set which step comes next, counted from 0, and how many there are in all."""
        self.finish()
        self._shares, self._left = self._open_shares(step), total - step

    def finish(self) -> None:
        """Wait for ids that were sent ahead and are no longer needed."""
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

    def next_batch(self) -> RankBatch:
        """Return the next batch; its ids may be on their way already."""
        batch, self._next = self._next or self._load_taught(next(self._shares)), None
        self._left -= 1
        self.model.transport.take(batch.inputs.dense, batch.inputs.labels)
        return batch

    def may_move(self, loss: Tensor) -> bool:
        """Whether weights may be moved by a loss; on a GPU it is looked at later.

        There, a loss that is not finite ends training when it is read: before anything is saved.
        """
        return self.model.transport.is_asynchronous or math.isfinite(float(loss.detach()))

    def read_losses(
        self, new: tuple[int, Tensor] | None = None, *, at_once: bool
    ) -> list[tuple[int, float]]:
        """Return steps and their losses, this rank's; on a GPU many together, for it is waited for.

        Args:
            new: A step that was taken, and its loss.
            at_once: Whether all are needed now: before a measurement or a checkpoint.
        """
        self._unread += [new] if new is not None else []
        waits = self.model.transport.is_asynchronous and not at_once
        if not self._unread or (waits and len(self._unread) < READ_EVERY):
            return []
        steps, losses = zip(*self._unread, strict=True)
        self._unread.clear()
        return list(zip(steps, torch.stack(losses).tolist(), strict=True))

    def send_next_ids(self) -> None:
        """Start to send the ids of the batch after this one, unless prefetching is off."""
        if self.config.prefetch and self._left > 0:
            self._next = self._load_taught(next(self._shares))
            self.model.towers.start_input(self._next.inputs.sparse)

    def advance_next_ids(self) -> None:
        """Let the ids follow their numbers, which every rank has by now.

        Between the forward and the backward pass: all ranks queue collectives in the same order.
        """
        if self._next is not None:
            self.model.towers.advance_input()

    def _load_taught(self, share: Share) -> RankBatch:
        """Load rows to train on: their labels are mixed with what the teacher says of them."""
        if self._teacher is not None:
            share = replace(share, batch=self._teacher.mix(share.batch))
        return self._load(share)

    def _load(self, share: Share) -> RankBatch:
        transport = self.model.transport
        with transport.ahead():
            inputs = to_jagged(share.batch, self.spec, transport, weighted=self.model.weighted)
        return RankBatch(inputs=inputs, share=share)

    def loss(self, logits: Tensor, batch: RankBatch) -> Tensor:
        """Return the loss of this rank: its mean over ranks is the mean over the global batch.

        Args:
            logits: Shape (B,).
            batch: The rows. If a rank has fewer than the others, copies fill it up: these do not
                count.
        """
        labels, share = batch.inputs.labels, batch.share
        assert labels is not None
        if share.counted == len(logits) and share.total == len(logits) * self.layout.world_size:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        counts = torch.arange(len(logits), device=logits.device) < share.counted
        return (each * counts).sum() * (self.layout.world_size / share.total)

    def warm_up(self) -> None:
        """Run the first batch forward and back twice, with a learning rate of 0.

        DistributedDataParallel orders its buckets anew before the third forward pass, and with
        them the sums over more than two ranks: a training that was resumed would differ in the
        last bit from one that was not interrupted. Afterwards Adagrad's sums are the squared
        gradients of the first batch, see `start_sums`.
        """
        batch = self._load_taught(next(self._open_shares(0)))
        self.tables.set_lr(0.0)
        for _ in range(2):
            fill_sums(self.tables, self.spec, 0.0)
            self.dense.zero_grad()
            loss = self.loss(self.model(batch.inputs), batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.tables.replicated.step()
        self.dense.zero_grad()

    def start_sums(self, carried: Mapping[str, TensorInfo]) -> None:
        """Set what Adagrad's sums of squared gradients start from, after `warm_up`.

        Args:
            carried: Table -> those that the bundle has, in its files.
        """
        fused, spec = self.tables, self.spec
        if "adagrad" not in self.config.table_optimizer:
            return
        if self.config.initial_accumulator is not None:
            fill_sums(fused, spec, self.config.initial_accumulator)
            return
        if any(table.name not in carried for table in spec.tables):
            whole = next(self._open_shares(0, whole=True)).batch
            fill_sums_by_mean(fused, spec, count_touched(spec, whole), self._device)
        if carried:
            carry_sums(fused, spec, carried)

    def measure(self) -> Accuracy:
        """Measure on the validation rows; the same on every rank."""
        self.model.parallel.eval()
        parts = []
        with torch.no_grad():
            for share, inputs in self._ahead(self._valid_shares()):
                assert inputs.labels is not None
                blocks = torch.from_numpy(loss_blocks(share.rows)).to(self._device)
                found = (self.model(inputs), inputs.labels, blocks)
                parts.append(torch.stack([x[: share.counted].float() for x in found]))
        self.model.parallel.train()
        return self._measure_all(torch.cat(parts, dim=1))

    def _ahead(self, shares: Iterator[Share]) -> Iterator[tuple[Share, JaggedBatch]]:
        """Load shares; ids of each are sent while the one before is computed."""
        loaded: deque[RankBatch] = deque()
        for share in chain(shares, [None]):
            if share is not None:
                loaded.append(self._load(share))
                if self.config.prefetch:
                    self.model.towers.start_input(loaded[-1].inputs.sparse)
                    self.model.towers.advance_input()
            if len(loaded) == 2 or (share is None and loaded):
                batch = loaded.popleft()
                self.model.transport.take(batch.inputs.dense, batch.inputs.labels)
                yield batch.share, batch.inputs

    def _valid_shares(self) -> Iterator[Share]:
        world_size = self.layout.world_size
        shares = deal_batches(
            self._valid_rows,
            _EVALUATION_ROWS * world_size,
            rank=self.layout.rank,
            world_size=world_size,
        )
        return adapt_shares(self._valid_rows, self.spec, shares)

    def _measure_all(self, own: Tensor) -> Accuracy:
        """Gather all ranks' rows on rank 0, measure there, and broadcast the result.

        Args:
            own: Logits, labels and blocks of this rank's rows, shape (3, n).
        """
        counts = [0] * self.layout.world_size
        dist.all_gather_object(counts, own.shape[1])
        filled = nn.functional.pad(own, (0, max(counts) - own.shape[1]))
        is_first = self.layout.rank == 0
        gathered = [torch.empty_like(filled) for _ in counts] if is_first else None
        dist.gather(filled, gathered)
        found: list[Accuracy | None] = [None]
        if gathered is not None:
            parts = [part[:, :n] for part, n in zip(gathered, counts, strict=True)]
            joined = torch.cat(parts, dim=1).cpu().numpy()
            found = [_measure(joined[0], joined[1], joined[2].astype(np.int64))]
        dist.broadcast_object_list(found)
        assert found[0] is not None
        return found[0]

    def average_losses(self, progress: Progress) -> None:
        """Make all losses since the last evaluation means over the ranks; all ranks at once.

        A sum over ranks of float32 losses is exact in float64: when it is taken changes nothing.
        """
        own = progress.losses[progress.averaged :]
        if own:
            each = torch.tensor(own, dtype=torch.float64, device=self._device)
            dist.all_reduce(each)
            progress.losses[progress.averaged :] = (each / self.layout.world_size).tolist()
        progress.averaged = len(progress.losses)

    def own_absurd_weights(self) -> list[str]:
        """Say which of this rank's weights are absurd, a line each."""
        found = list(name_absurd(self.model.dense_parameters().items()))
        for table, top, _, part in table_shards(self.model):
            found += name_absurd([(f"table {table!r}", part)], first_row=top)
        return found

    def absurd_weights(self) -> list[str]:
        """Say which weights of all ranks are absurd, a line each; all ranks at once."""
        found: list[list[str]] = [[] for _ in range(self.layout.world_size)]
        dist.all_gather_object(found, self.own_absurd_weights())
        return list(dict.fromkeys(line for lines in found for line in lines))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the model and its optimizers; shares memory."""
        return {
            "model": self.model.state_dict(),
            "dense_optimizer": self.dense.state(),
            "table_optimizer": self.tables.state_dict(),
        }


def _measure(logits: FloatArray, labels: FloatArray, blocks: IntArray) -> Accuracy:
    if not np.isfinite(logits).all():
        return Accuracy(auc=None, log_loss=math.nan, ne=None)
    return measure_accuracy(logits, labels, blocks=blocks)
