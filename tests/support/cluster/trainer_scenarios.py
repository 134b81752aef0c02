"""What ranks do with a `ClusterTrainer`, and how they meet; run by `rank_server`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.comm import intra_and_cross_node_pg

from dmt_convert.cluster import (
    ShardedModel,
    fused_parameters,
    shard_model,
    start_ranks,
    stop_ranks,
    table_shards,
)
from dmt_convert.cluster.ranks import read_layout
from dmt_convert.cluster.trainer import ClusterTrainer
from dmt_convert.config import TrainingConfig
from dmt_convert.errors import ConfigError
from dmt_convert.recipes.finetune_dmt import take_step
from dmt_convert.training import Progress, train
from dmt_convert.training.data import open_training_data
from dmt_convert.training.in_memory import BestInMemory
from support.cluster.cluster_cases import (
    Case,
    join_shards,
    largest_difference,
    own_shards,
    whole_tables,
)
from support.cluster.emulated_gpu import EmulatedGpu, make_transport, stands_for_nccl
from support.cluster.sabotage import sabotage


def meet(
    timeout_seconds: float,
    hosts_per_tower: int = 1,
    ports: Sequence[int] = (0,),
    unset: Sequence[str] = (),
) -> dict[str, Any]:
    """Start the ranks, and stop them, once per port; say who came, or what was said instead."""
    begin = time.monotonic()
    found: dict[str, Any] = {"error": None, "groups": []}
    for name in unset:
        del os.environ[name]
    try:
        for port in ports:
            if port:
                os.environ["MASTER_PORT"] = str(port)
            layout = read_layout("gloo")
            limit = timedelta(seconds=timeout_seconds)
            start_ranks(layout, hosts_per_tower=hosts_per_tower, timeout=limit)
            groups = intra_and_cross_node_pg(torch.device("cpu"))
            found["groups"].append([dist.get_process_group_ranks(group) for group in groups])
            stop_ranks()
    except ConfigError as error:
        found["error"] = str(error)
    stop_ranks()  # does nothing where there are none
    found["interface"] = os.environ.get("GLOO_SOCKET_IFNAME")
    return {**found, "seconds": time.monotonic() - begin}


def train_with_trainer(
    data: str, config: dict[str, Any], measure_every: int = 0, restart_at: int = -1, **options: Any
) -> dict[str, Any]:
    """Train with a `ClusterTrainer`; return losses and a digest of the tables."""
    case = Case.from_json(options)
    sharded, trainer = _trainer(case, data, TrainingConfig(**config))
    trainer.finish()  # nothing to forget yet
    trainer.start_at(0, case.steps)
    losses, measured = [], []
    for step in range(case.steps):
        if step == restart_at:
            trainer.start_at(step, case.steps)
        losses.append(float(take_step(trainer, 1.0)))
        if measure_every and step % measure_every == 0:
            measured.append(trainer.measure().log_loss)
            ahead = int(trainer._next is not None)
            assert len(sharded.towers._ahead) == ahead, "ids of measured rows were taken up"
    trainer.finish()
    tables = _whole(case, sharded)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tables.values())).hexdigest()
    return {"losses": losses, "tables": digest, "measured": measured}


def train_on_gpu(
    data: str, config: dict[str, Any], broken: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train, measure and average losses, on an emulated GPU if the ranks stand for NCCL's.

    Returns what `train_with_trainer` does, and what this rank's host waited for in the steps.
    """
    case, gpu = Case.from_json(options), EmulatedGpu()
    watched = gpu.watch() if stands_for_nccl() else nullcontext()
    with sabotage(broken), watched:
        sharded, trainer = _trainer(case, data, TrainingConfig(**config), on_gpu=True)
        gpu.parameters += sharded.parallel.parameters()
        trainer.warm_up()
        trainer.start_sums({})
        trainer.start_at(0, case.steps)
        take_step(trainer, 1.0)  # constants are made when they are first needed
        gpu.waits.clear()
        losses = [take_step(trainer, 1.0) for _ in range(case.steps - 1)]
        steps = dict(gpu.waits)
        trainer.finish()
        given = enumerate(losses, start=1)
        early = [trainer.read_losses(new, at_once=False) for new in given]
        read = [*chain(*early), *trainer.read_losses(at_once=True)]
        assert [step for step, _ in read] == list(range(1, case.steps))
        progress = Progress(losses=[loss for _, loss in read])
        trainer.average_losses(progress)
        measured = trainer.measure().log_loss
        held = sum(gpu.holds(p) for p in sharded.parallel.parameters())
    tables = _whole(case, sharded)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tables.values())).hexdigest()
    return {
        "losses": progress.losses,
        "tables": digest,
        "measured": measured,
        "shards": len(table_shards(sharded)),
        "waits": {place: count / (case.steps - 1) for place, count in steps.items()},
        "held": held,
    }


def trainer_against_one_process(
    data: str, config: dict[str, Any], broken: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train over the ranks, and in one process by the same settings."""
    case, settings = Case.from_json(options), TrainingConfig(**config)
    sharded, trainer = _trainer(case, data, settings)
    rows = open_training_data(Path(data))
    total = settings.total_steps(rows.train.num_rows)
    with sabotage(broken):
        trainer.warm_up()
        trainer.start_sums({})
        trainer.start_at(0, total)
        factors = [settings.lr_factor(step, total) for step in range(1, total + 1)]
        mine = [float(take_step(trainer, factor)) for factor in factors]
        trainer.finish()
    progress = Progress(losses=mine)
    trainer.average_losses(progress)
    mine = progress.losses
    ended = trainer.measure()
    plain, theirs, evaluations = case.model(), [], []
    BestInMemory.restore = lambda best: None  # compared is the last state, not the best
    train(
        plain,
        rows.train,
        rows.valid,
        settings,
        on_step=lambda step, loss: theirs.append(loss),
        on_evaluation=lambda evaluation: evaluations.append(evaluation),
    )
    return {
        "losses": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
        "log_loss": abs(ended.log_loss - evaluations[-1].log_loss),
        "tables": largest_difference(_whole(case, sharded), whole_tables(plain)),
        "moved": largest_difference(whole_tables(plain), whole_tables(case.model())),
    }


def _trainer(
    case: Case, data: str, config: TrainingConfig, *, on_gpu: bool = False
) -> tuple[ShardedModel, ClusterTrainer]:
    layout = read_layout("gloo")
    plan = case.plan(layout.hosts, layout.ranks_per_host)
    os.environ["TORCHREC_RESOLVED_POD_SIZE"] = str(plan.hosts_per_tower)
    model = case.model()
    tables = whole_tables(model)
    sharded = shard_model(
        model,
        plan,
        transport=make_transport(on_gpu=on_gpu),
        fused_params=fused_parameters(config.table_optimizer, lr=config.table_lr),
        comm_dtype=config.comm_dtype,
        dense_comm_dtype=config.dense_comm_dtype,
    )
    with torch.no_grad():
        for name, top, left, part in table_shards(sharded):
            part.copy_(tables[name][top : top + len(part), left : left + part.shape[1]])
    rows = open_training_data(Path(data))
    trainer = ClusterTrainer(
        sharded, case.spec(), layout, config, train_rows=rows.train, valid_rows=rows.valid
    )
    return sharded, trainer


def _whole(case: Case, sharded: ShardedModel) -> dict[str, torch.Tensor]:
    shapes = {table.name: (table.rows, table.dim) for table in case.spec().tables}
    return join_shards(shapes, own_shards(sharded))
