"""Training over many ranks from checkpoint to checkpoint: going on, saving, the best state.

Every rank calls everything, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dmt_convert.bundle import open_bundle_model
from dmt_convert.checkpoint import TensorInfo, read_tensor
from dmt_convert.cluster.checkpoint_tables import open_tables
from dmt_convert.cluster.checkpoint_tensors import flatten_tensors
from dmt_convert.cluster.cluster_accumulators import saved_sums
from dmt_convert.cluster.cluster_job import ClusterJob, Listeners
from dmt_convert.cluster.cluster_restarts import mark_begun
from dmt_convert.cluster.cluster_training import ClusterTrainer
from dmt_convert.cluster.rank_agreement import Ranks
from dmt_convert.cluster.resharding import load_state
from dmt_convert.cluster.saved_checkpoint import SavedCheckpoint, read_payload
from dmt_convert.cluster.shard_loading import table_shards
from dmt_convert.cluster.training_checkpoints import CheckpointStore
from dmt_convert.errors import CheckpointError
from dmt_convert.metrics import Accuracy
from dmt_convert.training import (
    TORCH_DTYPES,
    Progress,
    Schedule,
    TrainedModel,
    TrainingParts,
    TrainResult,
    bundle_digest,
    judge,
    run_loop,
    table_infos,
)

_HEAD: Final = "model.head."
_TOWER: Final = re.compile(r"(\btowers\.towers\.)(\d+)\.")


def find_checkpoint(
    job: ClusterJob, store: CheckpointStore, ranks: Ranks, *, goes_on: bool
) -> SavedCheckpoint | None:
    """Find the checkpoint to go on from, and remove what stands in the way; all ranks at once.

    Args:
        job: What to do.
        store: The checkpoints.
        ranks: All ranks.
        goes_on: Whether checkpoints are gone on from.

    Returns:
        The checkpoint; None: training starts anew.

    Raises:
        CheckpointError: There are checkpoints, and nobody said what is to become of them; or they
            are of another training.
    """
    found = store.newest()
    if found is not None and not goes_on:
        if not job.force:
            raise CheckpointError(
                f"{job.checkpoints} holds checkpoints of a training, up to step {found.step}",
                expected="--resume, to go on from there; or an empty folder",
                hint="add --resume; or --force, to start anew and remove them",
            )
        store.discard_after(-1)
        found = None
    if found is not None:
        _check_training(found, ranks.on_first(lambda: describe_training(job)))
        store.discard_after(found.step)
    ranks.on_first(lambda: mark_begun(job.checkpoints))
    return found


def describe_training(job: ClusterJob) -> dict[str, Any]:
    """Say what has to be the same for a checkpoint to be gone on from."""
    config = job.config
    return {
        "bundle": bundle_digest(job.bundle),
        "training rows": job.data.train.num_rows,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "table_optimizer": config.table_optimizer,
        "dense_optimizer": config.dense_optimizer,
    }


def _check_training(found: SavedCheckpoint, mine: Mapping[str, Any]) -> None:
    theirs = found.progress.get("training", {})
    different = [
        f"{name}: {theirs.get(name)!r} there, {value!r} here"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"{found.path} is of another training",
            expected="the same bundle, rows, batch size, seed and optimizers",
            hint="give the settings that it was started with, or another --checkpoints folder",
            details=different,
        )


class ClusterTraining:
    """Training, and the checkpoints that it leaves.

    Args:
        job: What to do.
        trainer: The model over the ranks.
        store: The checkpoints.
        found: The checkpoint to go on from, if any.
    """

    def __init__(
        self,
        job: ClusterJob,
        trainer: ClusterTrainer,
        store: CheckpointStore,
        found: SavedCheckpoint | None,
    ) -> None:
        self._job, self._trainer, self._store, self._found = job, trainer, store, found
        self._best_step = 0
        self._result_step = 0

    def train(self, listeners: Listeners) -> TrainResult:
        """Train from the start, or from the checkpoint."""
        job, trainer = self._job, self._trainer
        num_rows = job.data.train.num_rows
        schedule = Schedule(
            total_steps=job.config.total_steps(num_rows),
            eval_every=job.config.steps_between_evaluations(num_rows),
            save_every=job.config.checkpoint_every,
        )
        trainer.rehearse()
        progress = self._resume()
        if progress is None:
            trainer.start_sums(job.bundle.accumulators)
        start = 0 if progress is None else progress.step
        trainer.start_at(start, schedule.total_steps)
        listeners.on_start(start)
        parts = TrainingParts(
            step=trainer.step,
            measure=trainer.measure,
            best_state=self,
            mean_loss=trainer.mean_loss,
            save=self._save,
        )
        return run_loop(
            parts,
            job.config,
            schedule,
            progress=progress,
            on_step=listeners.on_step,
            on_evaluation=listeners.on_evaluation,
        )

    def keep(self) -> None:
        """Take the present state for the best: the checkpoint that follows holds it."""

    def restore(self) -> None:
        """Bring the best state back; of the start, nothing is needed but the bundle."""
        self._trainer.finish()
        self._store.wait()
        if self._best_step not in (0, self._result_step):
            self._load(self._saved(self._best_step))

    def _save(self, progress: Progress) -> None:
        progress.losses[:] = self._trainer.agree_losses(progress.losses)
        self._best_step, self._result_step = progress.best.step, progress.step
        self._store.save(
            progress.step,
            self._state(),
            {"training": describe_training(self._job), **progress.to_json()},
            asynchronous=self._job.config.async_checkpoints,
            protect=(progress.best.step,),
        )

    def _resume(self) -> Progress | None:
        if self._found is None:
            return None
        values = self._load(self._found)
        values.pop("training")
        progress = Progress.from_json(values)
        self._best_step, self._result_step = progress.best.step, progress.step
        return progress

    def _load(self, saved: SavedCheckpoint) -> dict[str, Any]:
        rows = {table.name: table.rows for table in self._trainer.spec.tables}
        return load_state(self._store, saved, self._state(), rows)

    def _state(self) -> dict[str, Tensor]:
        """The trainer's state; towers are called by their index, whatever the order of hosts."""
        order = self._job.plan.tower_order
        return {
            _TOWER.sub(lambda found: f"{found[1]}{order[int(found[2])]}.", name): tensor
            for name, tensor in flatten_tensors(self._trainer.state()).items()
        }

    def _saved(self, step: int) -> SavedCheckpoint:
        found = self._store.newest(before=step + 1)
        if found is None or found.step != step:
            raise CheckpointError(
                f"the best state, of step {step}, is no longer in {self._job.checkpoints}",
                expected="its checkpoint, whole",
                hint="resume from an earlier checkpoint, or train again",
            )
        return found

    def settle(self, result: TrainResult) -> TrainedModel:
        """Say what will be written: the best state as stored, or the start."""
        bundle = self._job.bundle
        infos = table_infos(bundle)
        rounded = {name: info.dtype for name, info in infos.items() if info.dtype != "fp32"}
        after, notes = judge(result, rounded, lambda: self._measure_rounded(rounded))
        module = open_bundle_model(bundle)
        if after is result.start:
            return TrainedModel(result=result, after=after, notes=notes, module=module, table=None)
        path = self._saved(self._best_step).path
        stored = {info.path: info for info in read_payload(path).tensors}
        _take_dense(module, stored, len(self._job.plan.tower_hosts))
        flat = bundle.manifest.model.flat
        return TrainedModel(
            result=result,
            after=after,
            notes=notes,
            module=module,
            table=open_tables(path, flat.tables).__getitem__,
            sums=saved_sums(stored, flat),
        )

    def _measure_rounded(self, rounded: Mapping[str, str]) -> Accuracy:
        with torch.no_grad():
            for table, _, _, part in table_shards(self._trainer.model):
                if table in rounded:
                    part.copy_(part.to(TORCH_DTYPES[rounded[table]]))
        return self._trainer.measure()


def _take_dense(module: torch.nn.Module, stored: Mapping[str, TensorInfo], towers: int) -> None:
    """Give a model its dense parts from a checkpoint."""
    prefixes = {_HEAD: ""} | {
        f"model.towers.towers.{tower}.interaction.module.": f"towers.{tower}.tower_module."
        for tower in range(towers)
    }
    state = {
        into + name.removeprefix(prefix): torch.from_numpy(read_tensor(info).copy())
        for name, info in stored.items()
        for prefix, into in prefixes.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(state)
