"""Fine-tune a bundle, in one process or over the ranks that torchrun starts; write a new bundle.

    python -m dmt_convert.recipes.finetune_dmt --bundle ckpt-dmt4 --data clicks --out tuned
    torchrun --nnodes 2 --nproc-per-node 8 ... recipes/finetune_dmt.py --bundle ...
    torchrun --nproc-per-node 8 -m dmt_convert.recipes.finetune_dmt --bundle ...

`dmt finetune` starts it with torchrun. DATA is anything that `dmt evaluate` reads, with labels. A
folder with `train.npz` and `valid.npz` is trained on the first and measured on the second. Without
validation rows the last tenth of DATA is held out. The state with the best normalised entropy on
the validation rows is written. The start is a candidate, so that the new bundle is never worse
there than the old one. Settings: docs/finetune.md.

The file stands alone: copy it, and change the loop (`train`), a step (`take_step`) or what is
around them.

Exit codes are those of `dmt`: 0 done, 1 bug or a lost rank, 2 usage, 3 something you can mend.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# These import torch when a name is first used: options are checked before, which saves seconds.
from dmt_convert import bundle as bundles
from dmt_convert import cluster, training
from dmt_convert.adapter import load_adapter
from dmt_convert.config import RunConfig, add_arguments, parse_arguments
from dmt_convert.placement import read_plan


def finetune_over_ranks(options: argparse.Namespace, config: RunConfig) -> dict[str, Any] | None:
    """Fine-tune as one rank of several; every rank runs this. Rank 0 returns a summary."""
    # 1. What there is: this rank, the bundle, where its towers go, the rows
    cluster.check_requirements()
    layout = cluster.read_layout(config.backend)
    bundle = bundles.open_bundle(options.bundle)
    config, rates = training.choose_rates(config, bundle)
    given = None if config.plan is None else read_plan(config.plan)
    plan = cluster.choose_plan(bundle, layout, given, config.table_optimizer)
    data = training.open_training_data(config.data, config.valid, bundle.manifest)
    out = config.out or cluster.default_out(options.bundle)
    folder = config.checkpoints or Path(f"{out}.checkpoints")
    is_first = layout.rank == 0
    monitor = training.Monitor(
        config,
        data,
        say=printer(options) if is_first else None,
        log=(config.log or folder / "log") if is_first else None,
    )

    # 2. The process groups. From here on ranks wait for each other: all of them have to call the
    #    same functions in the same order.
    limit = timedelta(seconds=config.timeout)
    ranks = cluster.start_ranks(layout, hosts_per_tower=plan.hosts_per_tower, timeout=limit)
    cluster.check_memory(bundle, plan, config.table_optimizer, layout, ranks)
    monitor.say(
        f"{layout}, {config.comm_dtype or 'the precision of codes'} between hosts; "
        f"{len(plan.tower_order)} towers, hosts per tower: {plan.hosts_per_tower}; checkpoints in "
        f"{folder}"
    )
    choice, teacher = cluster.open_teacher_together(ranks, bundle, config, layout.device)
    monitor.say(choice.line)
    monitor.say(rates)

    # 3. Where the result goes, and the checkpoint to go on from, if any. If torchrun had to start
    #    the ranks again, training goes on without --resume.
    job = cluster.ClusterJob(
        bundle=bundle,
        plan=plan,
        data=data,
        config=config,
        out=out,
        checkpoints=folder,
        resume=config.resume,
        force=config.force,
        teacher=choice.record,
    ).after_restart(ranks)
    ranks.on_first(lambda: training.check_out(bundle, job.out, force=job.force))
    checkpoints = cluster.TrainingCheckpoints(job, ranks)

    # 4. The model over the ranks, its optimizers, this rank's rows
    trainer = build_trainer(job, layout, checkpoints, teacher)
    progress = start(job, trainer, checkpoints)

    # 5. The loop
    with monitor, cluster.STOP_REQUEST.watch():
        monitor.start(progress.step)
        train(trainer, checkpoints, progress, monitor)

    # 6. The new bundle, written by rank 0: whole, or not at all
    trained = checkpoints.result(trainer, progress)
    written: list[training.Finetuned] = []  # stays on rank 0
    ranks.on_first_slowly(lambda: written.append(write(job, trained)))
    checkpoints.close()
    cluster.stop_ranks()
    if not written:
        return None
    monitor.finish(trained.result, written[0])
    return training.summarise(bundle, written[0], trained.result, data)


def build_trainer(
    job: cluster.ClusterJob,
    layout: cluster.RankLayout,
    checkpoints: cluster.TrainingCheckpoints,
    teacher: training.Teacher | None = None,
) -> cluster.ClusterTrainer:
    """Spread the model: towers on their hosts, tables in shards, dense parts on every rank."""
    model = cluster.shard_bundle(
        job.bundle, job.plan, layout, job.config, weighted=job.data.has_weights
    )
    if not checkpoints.resumes:  # every rank reads its own shards
        cluster.load_shards(model, training.table_infos(job.bundle))
    return cluster.ClusterTrainer(
        model,
        job.bundle.manifest.model.flat,
        layout,
        job.config,
        train_rows=job.data.train,
        valid_rows=job.data.valid,
        teacher=teacher,
    )


def start(
    job: cluster.ClusterJob,
    trainer: cluster.ClusterTrainer,
    checkpoints: cluster.TrainingCheckpoints,
) -> training.Progress:
    """Bring model and optimizers to where training starts; returns how far it is."""
    trainer.warm_up()
    if checkpoints.resumes:
        return checkpoints.resume(trainer)
    trainer.start_sums(job.bundle.accumulators)  # Adagrad's sums of squared gradients
    return training.Progress()


def train(
    trainer: cluster.ClusterTrainer,
    checkpoints: cluster.TrainingCheckpoints,
    progress: training.Progress,
    monitor: training.Monitor,
) -> None:
    """Train until the last step, or until evaluations no longer get better."""
    config = trainer.config
    schedule = training.Schedule.of(config, checkpoints.job.data.train.num_rows)
    trainer.start_at(progress.step, schedule.total_steps)
    if not progress.history:  # the start is a candidate, too
        evaluate(trainer, progress, monitor)
    elif progress.best_is_lost and evaluate(trainer, progress, monitor):
        checkpoints.save(trainer, progress)
    while progress.step < schedule.total_steps and not progress.is_over(config.patience):
        begin = time.perf_counter()
        progress.step += 1
        loss = take_step(trainer, config.lr_factor(progress.step, schedule.total_steps))
        losses = trainer.read_losses(
            (progress.step, loss), at_once=schedule.measures(progress.step)
        )
        note_losses(trainer, losses, progress, monitor)
        progress.seconds += time.perf_counter() - begin

        is_best = schedule.measures(progress.step) and evaluate(trainer, progress, monitor)
        demand = checkpoints.demand()  # by the clock, or by a signal; the same on all ranks
        if is_best or demand or schedule.saves(progress.step):
            note_losses(trainer, trainer.read_losses(at_once=True), progress, monitor)
            checkpoints.save(trainer, progress)
        if demand is cluster.Demand.STOP and progress.step < schedule.total_steps:
            checkpoints.stop(progress)


def note_losses(
    trainer: cluster.ClusterTrainer,
    losses: list[tuple[int, float]],
    progress: training.Progress,
    monitor: training.Monitor,
) -> None:
    """Take losses of steps; raises if training diverged, so that nothing of it is saved."""
    for step, loss in losses:
        progress.note_loss(loss, trainer.own_absurd_weights, step)
        monitor.on_step(step, loss)


def take_step(trainer: cluster.ClusterTrainer, lr_factor: float) -> torch.Tensor:
    """Take one step on the next batch.

    Args:
        trainer: Model, optimizers, batches.
        lr_factor: What learning rates are multiplied by: warm-up and decay.

    Returns:
        This rank's loss before the step, on its device. If it is not finite, no weight was changed
        on a CPU; on a GPU, which is not waited for, training ends when the loss is read.
    """
    batch = trainer.next_batch()
    trainer.dense.zero_grad()
    # TorchRec fuses the tables' optimizer with the backward pass, which takes this rate
    trainer.tables.set_lr(trainer.config.table_lr * lr_factor)
    trainer.send_next_ids()  # they travel while this batch is computed
    loss = trainer.loss(trainer.model(batch.inputs), batch)
    trainer.advance_next_ids()
    if trainer.may_move(loss):
        loss.backward()  # type: ignore[no-untyped-call]
        trainer.dense.step(lr_factor)
    return loss.detach()


def evaluate(
    trainer: cluster.ClusterTrainer, progress: training.Progress, monitor: training.Monitor
) -> bool:
    """Measure on the validation rows; returns whether the model is the best so far."""
    accuracy = trainer.measure()
    trainer.average_losses(progress)
    is_best = progress.note_accuracy(accuracy, progress.mean_loss, trainer.absurd_weights)
    monitor.on_evaluation(progress.history[-1])
    return is_best


def write(job: cluster.ClusterJob, trained: training.TrainedModel) -> training.Finetuned:
    """Write the best state as a new bundle."""
    return training.write_trained(
        job.bundle, job.out, trained, config=job.config, data=job.data, force=job.force
    )


def finetune_alone(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Fine-tune in this process, in plain torch, with tables in memory; returns a summary.

    The loop is `dmt_convert.training.train`: the one above, with the best state kept in memory.
    """
    bundle = bundles.open_bundle(options.bundle)
    config, rates = training.choose_rates(config, bundle)
    out = config.out or cluster.default_out(options.bundle)
    training.check_out(bundle, out, force=config.force)
    data = training.open_training_data(config.data, config.valid, bundle.manifest)
    training.check_memory(bundle.manifest.model.flat, config, data.train.num_rows)
    choice = training.choose_teacher(bundle, config.teacher, config.teacher_weight, config.model)
    model = training.load_bundle(bundle)
    with training.Monitor(config, data, say=printer(options), log=config.log) as monitor:
        monitor.say(f"one process on CPU; {choice.line}")
        monitor.say(rates)
        monitor.start()
        result = training.train(
            model,
            data.train,
            data.valid,
            config,
            teacher=training.open_teacher(choice, bundle, config.model),
            on_step=monitor.on_step,
            on_evaluation=monitor.on_evaluation,
        )
    written = training.write_finetuned(
        bundle,
        out,
        model,
        result,
        config=config,
        data=data,
        teacher=choice.record,
        force=config.force,
    )
    monitor.finish(result, written)
    return training.summarise(bundle, written, result, data)


def printer(options: argparse.Namespace) -> Callable[[str], None] | None:
    """Return what prints a line; None if nothing is to be shown."""
    return None if options.quiet or options.json else partial(print, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Describe the options: those of `dmt finetune` (dmt_convert/config) and a few more."""
    parser = argparse.ArgumentParser(
        prog="finetune_dmt",
        description="Fine-tune a bundle, in one process or over the ranks that torchrun starts.",
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle to start from; it is not changed")
    add("--json", action="store_true", help="print only one JSON document")
    add("--quiet", action="store_true", help="print no progress")
    add_arguments(parser, RunConfig)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe; errors become one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # paths may hold what the locale's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    options = parser.parse_args(arguments)
    timeout = options.timeout or RunConfig.model_fields["timeout"].default
    with cluster.training_process(
        json_errors=options.json, quiet=options.quiet or options.json, timeout=timeout
    ):
        config = parse_arguments(RunConfig, vars(options))
        if config.model is not None:
            load_adapter(config.model)
        alone = cluster.current_rank() is None
        summary = (finetune_alone if alone else finetune_over_ranks)(options, config)
    if options.json and summary is not None:
        print(json.dumps(summary, indent=1, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
