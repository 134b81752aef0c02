"""What a training over ranks saves, resumes from, and takes its result from.

All methods are collective: every rank calls them, in the same order.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import TensorInfo, read_tensor
from dmt_convert.cluster.checkpoint_folder import (
    DamagedCheckpointError,
    SavedCheckpoint,
    is_continuing,
    mark_begun,
    read_payload,
)
from dmt_convert.cluster.checkpoint_store import CheckpointStore, load_resharded
from dmt_convert.cluster.checkpoint_tensors import (
    flatten_tensors,
    open_tables,
)
from dmt_convert.cluster.demands import Demand, Demands
from dmt_convert.cluster.optimizers import saved_sums
from dmt_convert.cluster.rank_process import STOP_REQUEST, InterruptError
from dmt_convert.cluster.ranks import Ranks
from dmt_convert.cluster.sharding import table_shards
from dmt_convert.cluster.trainer import ClusterTrainer
from dmt_convert.config import TrainingConfig
from dmt_convert.data import Dataset
from dmt_convert.documents import TeacherRecord
from dmt_convert.errors import CheckpointError
from dmt_convert.metrics import Accuracy
from dmt_convert.placement import TowerPlan
from dmt_convert.training import (
    TORCH_DTYPES,
    Progress,
    TrainedModel,
    TrainingData,
    TrainResult,
    bundle_digest,
    digest_share,
    join_digests,
    judge,
    table_infos,
)

logger = logging.getLogger(__name__)

_MAY_CHANGE: Final = (
    *("epochs", "max_steps", "eval_every", "patience", "warmup_steps", "lr_decay", "clip_norm"),
    *("dense_lr", "table_lr", "comm_dtype", "teacher_weight"),
)
"""Settings that shape the result and may differ when a training resumes; this is noted."""
_OTHER_TRAINING_HINT: Final = (
    "give the settings and rows that it was started with; to train on other rows, start anew: "
    "fine-tune the bundle that this training writes, with another --checkpoints folder"
)
_LABELS_ALONE: Final = "none"
_HEAD: Final = "model.head."
_TOWER: Final = re.compile(r"(\btowers\.towers\.)(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """What is to be trained over ranks, and what may be replaced."""

    bundle: Bundle
    """What training starts from."""
    plan: TowerPlan
    """Where its towers go."""
    data: TrainingData
    """Rows to train on and to measure on."""
    config: TrainingConfig
    """Settings."""
    out: Path
    """Where the new bundle goes."""
    checkpoints: Path
    """Folder of the training checkpoints; all hosts reach it."""
    resume: bool = False
    """Go on from the newest whole checkpoint, if there is one."""
    force: bool = False
    """Replace an existing bundle, and remove checkpoints unless training goes on from them."""
    teacher: TeacherRecord | None = None
    """What teaches beside the labels."""

    def after_restart(self, ranks: Ranks) -> ClusterJob:
        """Resume, and replace, what this very launch made before its ranks were started again."""
        if not ranks.on_first(lambda: is_continuing(self.checkpoints)):
            return self
        return replace(self, resume=True, force=True)

    def must_match(self, ranks: Ranks) -> dict[str, Any]:
        """Return what has to be the same for a checkpoint to be resumed; all ranks at once."""
        teacher = self.teacher
        taught = {} if teacher is None else {"teacher's dense weights": teacher.dense_digest}
        return {
            "bundle": bundle_digest(self.bundle),
            "training rows": self.data.train.num_rows,
            "digest of the training rows": _digest_together(self.data.train, ranks),
            "validation rows": self.data.valid.num_rows,
            "digest of the validation rows": _digest_together(self.data.valid, ranks),
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "table_optimizer": self.config.table_optimizer,
            "dense_optimizer": self.config.dense_optimizer,
            "teacher": _LABELS_ALONE if teacher is None else teacher.digest,
            **taught,
        }


def _digest_together(rows: Dataset, ranks: Ranks) -> str:
    """Digest rows, every rank a share of them."""
    shares = ranks.on_all(lambda: digest_share(rows, ranks.rank, ranks.size))
    return join_digests(rows, {first: run for share in shares for first, run in share.items()})


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {value} ({before[name]} before)"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


class TrainingCheckpoints:
    """What one training saves, resumes from and takes its result from.

    Args:
        job: What is trained.
        ranks: All ranks.

    Raises:
        CheckpointError: The folder holds checkpoints that neither `job.resume` nor `job.force`
            covers, or they are of another training, or it cannot be written to.
    """

    def __init__(self, job: ClusterJob, ranks: Ranks) -> None:
        self.job = job
        self._store = CheckpointStore(
            job.checkpoints, keep=job.config.keep_checkpoints, timeout=ranks.timeout
        )
        self._rows = {table.name: table.rows for table in job.bundle.manifest.model.flat.tables}
        self._must_match = job.must_match(ranks)
        self._settings = {name: getattr(job.config, name) for name in _MAY_CHANGE}
        self._found = self._choose()
        self._demands = Demands(ranks, job.config.checkpoint_seconds)
        ranks.on_first(lambda: mark_begun(job.checkpoints))

    def _choose(self) -> SavedCheckpoint | None:
        """Find the checkpoint to go on from; remove what is there only if that was asked for."""
        if not self.job.resume:
            steps = self._store.steps()
            if steps and not self.job.force:
                raise CheckpointError(
                    f"{self.job.checkpoints} holds checkpoints of a training, up to step "
                    f"{steps[-1]}",
                    expected="--resume, to go on from there; or an empty folder",
                    hint="add --resume; or --force, to remove them and start again",
                )
            self._store.discard_after(-1)
            return None
        found = self._store.newest()
        if found is None:
            return None
        # before there were teachers, labels were all that was learnt from
        theirs = {"teacher": _LABELS_ALONE, **found.progress.get("training", {})}
        different = [
            f"{name}: {theirs[name]!r} there, {value!r} here"
            for name, value in self._must_match.items()
            if name in theirs and theirs[name] != value
        ]
        if different:
            raise CheckpointError(
                f"{found.path} is of another training",
                expected="the same bundle, rows, teacher, batch size, seed and optimizers",
                hint=_OTHER_TRAINING_HINT,
                details=different,
            )
        self._store.notes[:0] = theirs.get("notes", [])
        unknown = [name for name in self._must_match if name not in theirs]
        if unknown:
            self._note(
                f"{found.path} was written by an earlier version: not compared were the "
                + ", the ".join(unknown)
            )
        changed = _changed_settings(theirs.get("settings", {}), self._settings)
        if changed:
            self._note(f"from step {found.step} on with other settings: {', '.join(changed)}")
        return found

    def _note(self, note: str) -> None:
        """Say something that the new bundle records, too."""
        logger.warning("%s", note)
        self._store.notes.append(note)

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._found is not None

    def resume(self, trainer: ClusterTrainer) -> Progress:
        """Load the checkpoint to go on from."""
        assert self._found is not None
        values = self._load(self._found, trainer)
        values.pop("training")
        progress = Progress.from_json(values)
        self._check_best(progress)
        return progress

    def _check_best(self, progress: Progress) -> None:
        """Forget a best state that is damaged or gone, before the time of training is spent."""
        best = progress.best.step
        if best in (0, progress.step):
            return
        try:
            if self._store.at(best) is not None:
                return
            fault = f"the checkpoint of step {best} is no longer in {self.job.checkpoints}"
        except DamagedCheckpointError as error:
            aside = self._store.set_aside(best)
            fault = f"{error.found}; it is set aside as {aside.name}"
        progress.forget_best()
        self._note(
            f"{fault}. It was the best state: the state of step {progress.step} is measured anew, "
            "and competes with the start instead"
        )

    def demand(self) -> Demand:
        """Return what is asked of the training after a step: a checkpoint, to stop, or nothing."""
        return self._demands.poll()

    def save(self, trainer: ClusterTrainer, progress: Progress) -> None:
        """Save the present state; that of the best step stays, too."""
        begin = time.monotonic()
        trainer.average_losses(progress)
        self._store.save(
            progress.step,
            self._state(trainer),
            {"training": self._describe(), **progress.to_json()},
            asynchronous=self.job.config.async_checkpoints,
            protect=(progress.best.step,),
        )
        self._demands.saved(time.monotonic() - begin)

    def _describe(self) -> dict[str, Any]:
        """What a checkpoint says of the training that it belongs to."""
        notes = {"notes": list(self._store.notes)} if self._store.notes else {}
        return {**self._must_match, "settings": self._settings, **notes}

    def stop(self, progress: Progress) -> NoReturn:
        """End a training that was asked to stop; its present state has been saved.

        Raises:
            InterruptError: It says where the checkpoint is, and how to go on.
        """
        self._store.wait()
        signal = STOP_REQUEST.signal
        by = "a signal to another rank" if signal is None else signal.name
        raise InterruptError(
            f"stopped by {by} after step {progress.step}; its checkpoint is in "
            f"{self.job.checkpoints}",
            expected="to train to the end",
            hint="run the same command again with --resume",
        )

    def result(self, trainer: ClusterTrainer, progress: Progress) -> TrainedModel:
        """Return what is to be written: the best state as it will be stored, or the start."""
        trainer.finish()
        self._demands.finish()
        self._store.wait()
        bundle, result = self.job.bundle, progress.result()
        told = tuple(self._store.notes)
        infos = table_infos(bundle)
        rounded = {name: info.dtype for name, info in infos.items() if info.dtype != "fp32"}
        after, notes = judge(
            result, rounded, lambda: self._measure_rounded(trainer, result, rounded)
        )
        module = open_bundle_model(bundle)
        if after is result.start:
            return TrainedModel(
                result=result,
                after=after,
                notes=told + notes,
                module=module,
                table=None,
                teacher=self.job.teacher,
            )
        path = self._saved(result.best_step).path
        stored = {info.path: info for info in read_payload(path).tensors}
        _load_dense(module, stored, len(self.job.plan.tower_hosts))
        flat = bundle.manifest.model.flat
        has_sums = "adagrad" in self.job.config.table_optimizer
        return TrainedModel(
            result=result,
            after=after,
            notes=told + notes,
            module=module,
            table=open_tables(path, flat.tables).__getitem__,
            # fbgemm calls the first moment of other rules by the same name
            sums=saved_sums(stored, flat) if has_sums else lambda table: None,
            teacher=self.job.teacher,
        )

    def _measure_rounded(
        self, trainer: ClusterTrainer, result: TrainResult, rounded: Mapping[str, str]
    ) -> Accuracy:
        """Measure the best state as its tables will be stored."""
        if result.best_step != result.steps:
            self._load(self._saved(result.best_step), trainer)
        with torch.no_grad():
            for table, _, _, part in table_shards(trainer.model):
                if table in rounded:
                    part.copy_(part.to(TORCH_DTYPES[rounded[table]]))
        trainer.model.towers.forget_cached_rows()
        return trainer.measure()

    def close(self) -> None:
        """Finish what is being written, and let others write to the folder."""
        self._store.close()

    def _saved(self, step: int) -> SavedCheckpoint:
        found = self._store.at(step)
        if found is None:
            raise CheckpointError(
                f"the best state, of step {step}, is no longer in {self.job.checkpoints}",
                expected="its checkpoint, whole",
                hint="run it again with --resume: the newest state is measured anew",
            )
        return found

    def _state(self, trainer: ClusterTrainer) -> dict[str, Tensor]:
        """The trainer's state; towers are named by their index, whatever the order of hosts."""
        order = self.job.plan.tower_order
        return {
            _TOWER.sub(lambda found: f"{found[1]}{order[int(found[2])]}.", name): tensor
            for name, tensor in flatten_tensors(trainer.state()).items()
        }

    def _load(self, saved: SavedCheckpoint, trainer: ClusterTrainer) -> dict[str, Any]:
        values = load_resharded(self._store, saved, self._state(trainer), self._rows)
        trainer.model.towers.forget_cached_rows()
        return values


def _load_dense(module: torch.nn.Module, stored: Mapping[str, TensorInfo], towers: int) -> None:
    """Load the dense parts of a model from a checkpoint."""
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
