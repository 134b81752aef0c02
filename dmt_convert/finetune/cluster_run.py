"""One training over many ranks: from a bundle to a new bundle, through checkpoints.

Every rank runs the same; rank 0 writes the new bundle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch

from dmt_convert.bundle import Bundle, open_bundle_model
from dmt_convert.checkpoint import read_tensor
from dmt_convert.engine import (
    RankLayout,
    fused_parameters,
    load_shards,
    shard_model,
    table_shards,
)
from dmt_convert.engine.jagged import carries_weights
from dmt_convert.errors import CheckpointError, PlanError
from dmt_convert.finetune.cluster_training import ClusterTrainer
from dmt_convert.finetune.finetune_config import FinetuneConfig
from dmt_convert.finetune.finetuned_bundle import (
    TORCH_DTYPES,
    Finetuned,
    TrainedModel,
    bundle_digest,
    judge,
    write_trained,
)
from dmt_convert.finetune.loading import table_infos
from dmt_convert.finetune.loop import (
    Evaluation,
    Progress,
    Schedule,
    TrainingParts,
    TrainResult,
    run_loop,
)
from dmt_convert.finetune.rank_agreement import Ranks
from dmt_convert.finetune.resharding import load_state
from dmt_convert.finetune.saved_checkpoint import SavedCheckpoint, read_payload
from dmt_convert.finetune.training_checkpoints import CheckpointStore
from dmt_convert.finetune.training_data import TrainingData
from dmt_convert.plan import Cluster, TowerPlan, plan_towers
from dmt_convert.scoring import Accuracy

logger = logging.getLogger(__name__)

_MODEL: Final = "model."
_HEAD: Final = "model.head."


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """What is to be trained, on what, where."""

    bundle: Bundle
    """What training starts from."""
    plan: TowerPlan
    """Where its towers go."""
    data: TrainingData
    """Rows to train on and to measure on."""
    config: FinetuneConfig
    """Settings."""
    layout: RankLayout
    """This rank."""
    checkpoints: Path
    """Folder of the training checkpoints; all hosts reach it."""
    timeout_seconds: float
    """How long a rank waits for the slowest one to write."""
    resume: bool = False
    """Go on from the newest whole checkpoint, where there is one."""
    restart: bool = False
    """Remove the checkpoints that are there."""


@dataclass(slots=True, kw_only=True)
class Listeners:
    """Who is told how training goes."""

    on_step: Callable[[int, float], None] = lambda step, loss: None
    """Step, from 1, and this rank's loss."""
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None
    """Every evaluation."""
    on_start: Callable[[int], None] = lambda step: None
    """The step at which training starts; above 0 where it goes on from a checkpoint."""
    notes: list[str] = field(default_factory=list)
    """Takes what a user should know."""


def choose_plan(bundle: Bundle, layout: RankLayout, given: TowerPlan | None) -> TowerPlan:
    """Choose where the towers go: the plan of the bundle, if it is of this cluster, or a new one.

    Args:
        bundle: What is trained.
        layout: The ranks that are there.
        given: The plan that was asked for, if any.

    Raises:
        PlanError: The plan that was asked for is of another cluster, or the towers cannot be
            placed on this one.
    """
    plan = bundle.plan if given is None else given
    found = (layout.hosts, layout.ranks_per_host)
    wanted = (plan.cluster.hosts, plan.cluster.ranks_per_host)
    if found == wanted:
        return plan
    if given is not None:
        raise PlanError(
            f"a plan for {wanted[0]} hosts x {wanted[1]} ranks, on {found[0]} hosts x "
            f"{found[1]} ranks",
            expected="as many hosts and ranks per host as torchrun starts",
            hint=f"make one with `dmt plan BUNDLE --hosts {found[0]} --ranks-per-host {found[1]}`, "
            "or leave the plan out",
        )
    model = bundle.manifest.model
    cluster = replace(plan.cluster, hosts=found[0], ranks_per_host=found[1])
    return plan_towers(model.flat, model.assignment, cluster, tower_widths=model.tower_widths)


def describe_cluster(cluster: Cluster) -> str:
    """Say how large a cluster is."""
    return f"{cluster.hosts} hosts x {cluster.ranks_per_host} ranks"


def finetune_on_cluster(
    job: ClusterJob, out: Path, listeners: Listeners, *, force: bool = False
) -> tuple[TrainResult, Finetuned | None]:
    """Train, and write the best state as a new bundle; all ranks at once.

    Args:
        job: What to do.
        out: The new bundle's folder.
        listeners: Told how it goes.
        force: Replace a bundle that is there.

    Returns:
        What came of training; on rank 0 also what was written.

    Raises:
        DmtError: Something is wrong with the input; on every rank.
    """
    limit = timedelta(seconds=job.timeout_seconds)
    trainer = _make_trainer(job)
    store = CheckpointStore(job.checkpoints, keep=job.config.keep_checkpoints, timeout=limit)
    ranks = Ranks(timeout=limit)
    try:
        run = _Run(job, trainer, store)
        result = run.train(listeners)
        trained = run.settle(result)
        written = ranks.on_first(
            lambda: _Written(
                write_trained(
                    job.bundle, out, trained, config=job.config, data=job.data, force=force
                )
            )
        )
    finally:
        store.close()
        ranks.close()
    return result, written.value if job.layout.rank == 0 else None


class _Written:
    """Keeps what rank 0 wrote from being sent to the others."""

    def __init__(self, value: Finetuned | None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Written, (None,)


def _make_trainer(job: ClusterJob) -> ClusterTrainer:
    """Spread the bundle's model over the ranks, with its weights."""
    model, layout, config = job.bundle.manifest.model, job.layout, job.config
    sharded = shard_model(
        open_bundle_model(job.bundle).train(),
        job.plan,
        device=layout.device,
        fused_params=fused_parameters(
            config.table_optimizer, lr=config.table_lr, device_type=layout.device_type
        ),
        comm_dtype=config.comm_dtype,
        weighted=carries_weights(model.flat) or job.data.has_weights,
    )
    load_shards(sharded, table_infos(job.bundle))
    return ClusterTrainer(
        sharded,
        model.flat,
        layout,
        config,
        train_rows=job.data.train,
        valid_rows=job.data.valid,
    )


class _Run:
    """Training, and the checkpoints that it leaves.

    Args:
        job: What to do.
        trainer: The model over the ranks.
        store: The checkpoints.
    """

    def __init__(self, job: ClusterJob, trainer: ClusterTrainer, store: CheckpointStore) -> None:
        self._job, self._trainer, self._store = job, trainer, store
        self._best_step = 0
        self._result_step = 0

    def train(self, listeners: Listeners) -> TrainResult:
        """Train from the start, or from the newest checkpoint."""
        job, trainer = self._job, self._trainer
        progress = self._resume()
        if progress is None:
            trainer.start_accumulators()
            trainer.start_at(0)
        else:
            trainer.start_at(progress.step)
        listeners.on_start(0 if progress is None else progress.step)
        num_rows = job.data.train.num_rows
        schedule = Schedule(
            total_steps=job.config.total_steps(num_rows),
            eval_every=job.config.steps_between_evaluations(num_rows),
            save_every=job.config.checkpoint_every,
        )
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
            self._trainer.state(),
            {"training": self._fingerprint(), **progress.to_json()},
            asynchronous=self._job.config.async_checkpoints,
            protect=(progress.best.step,),
        )

    def _resume(self) -> Progress | None:
        found = self._store.newest()
        if found is None:
            return None
        if self._job.restart and not self._job.resume:
            self._store.discard_after(-1)
            return None
        if not self._job.resume:
            raise CheckpointError(
                f"{self._job.checkpoints} holds checkpoints of a training, up to step {found.step}",
                expected="--resume, to go on from there; or an empty folder",
                hint="add --resume; or --force, to start anew and remove them",
            )
        self._check(found)
        values = self._load(found)
        self._store.discard_after(found.step)
        values.pop("training")
        progress = Progress.from_json(values)
        self._best_step, self._result_step = progress.best.step, progress.step
        return progress

    def _load(self, saved: SavedCheckpoint) -> dict[str, Any]:
        rows = {table.name: table.rows for table in self._trainer.spec.tables}
        return load_state(self._store, saved, self._trainer.state(), rows)

    def _fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a checkpoint to be gone on from."""
        config = self._job.config
        return {
            "bundle": bundle_digest(self._job.bundle),
            "training rows": self._job.data.train.num_rows,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "table_optimizer": config.table_optimizer,
            "dense_optimizer": config.dense_optimizer,
        }

    def _check(self, found: SavedCheckpoint) -> None:
        theirs, mine = found.progress.get("training", {}), self._fingerprint()
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
        module, table = open_bundle_model(bundle), None
        if after is not result.start:
            payload = read_payload(self._saved(self._best_step).path)
            stored = {info.path: info for info in payload.tensors}
            _take_dense(module, stored, self._job.plan)
            table = {
                name.split(".embedding_bags.")[1].rsplit(".", 1)[0]: info
                for name, info in stored.items()
                if name.startswith(_MODEL) and ".embedding_bags." in name
            }.__getitem__
        return TrainedModel(result=result, after=after, notes=notes, module=module, table=table)

    def _measure_rounded(self, rounded: Mapping[str, str]) -> Accuracy:
        with torch.no_grad():
            for table, _, _, part in table_shards(self._trainer.model):
                if table in rounded:
                    part.copy_(part.to(TORCH_DTYPES[rounded[table]]))
        return self._trainer.measure()


def _take_dense(module: torch.nn.Module, stored: Mapping[str, Any], plan: TowerPlan) -> None:
    """Give a model its dense parts from a checkpoint."""
    state = {
        name.removeprefix(_HEAD): torch.from_numpy(read_tensor(info).copy())
        for name, info in stored.items()
        if name.startswith(_HEAD)
    }
    for place, tower in enumerate(plan.tower_order):
        prefix = f"model.towers.towers.{place}.interaction.module."
        state |= {
            f"towers.{tower}.tower_module.{name.removeprefix(prefix)}": torch.from_numpy(
                read_tensor(info).copy()
            )
            for name, info in stored.items()
            if name.startswith(prefix)
        }
    module.load_state_dict(state)


def read_plan(path: Path) -> TowerPlan:
    """Read a plan that `dmt plan --out` wrote.

    Raises:
        PlanError: It cannot be read, or is no plan.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"the plan {path} cannot be read ({reason})",
            expected="the JSON that `dmt plan --out` writes",
            hint="make it anew with `dmt plan`",
        ) from None
    return TowerPlan.from_json(value)
