"""One training over many ranks: from a bundle to a new bundle, through checkpoints.

Every rank runs the same; rank 0 writes the new bundle.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from dmt_convert.bundle import open_bundle_model
from dmt_convert.cluster.cluster_checkpoints import ClusterTraining, find_checkpoint
from dmt_convert.cluster.cluster_job import ClusterJob, Listeners
from dmt_convert.cluster.cluster_model import shard_model
from dmt_convert.cluster.cluster_restarts import is_continuing
from dmt_convert.cluster.cluster_training import ClusterTrainer
from dmt_convert.cluster.jagged import carries_weights
from dmt_convert.cluster.rank_agreement import Ranks
from dmt_convert.cluster.shard_loading import load_shards
from dmt_convert.cluster.table_optimizer import fused_parameters
from dmt_convert.cluster.training_checkpoints import CheckpointStore
from dmt_convert.training import Finetuned, TrainResult, check_out, table_infos, write_trained


def finetune_on_cluster(
    job: ClusterJob, listeners: Listeners
) -> tuple[TrainResult, Finetuned | None]:
    """Train, and write the best state as a new bundle; all ranks at once.

    After an error the ranks can do nothing together any more, and their processes should end.

    Args:
        job: What to do.
        listeners: Told how it goes.

    Returns:
        What came of training; on rank 0 also what was written.

    Raises:
        DmtError: Something is wrong with the input; on every rank, or on one whose rows are.
        RuntimeError: A rank is lost.
    """
    limit = timedelta(seconds=job.timeout_seconds)
    ranks = Ranks(timeout=limit)
    continues = ranks.on_first(lambda: is_continuing(job.checkpoints))
    force = job.force or continues
    ranks.on_first(lambda: check_out(job.bundle, job.out, force=force))
    store = CheckpointStore(job.checkpoints, keep=job.config.keep_checkpoints, timeout=limit)
    found = find_checkpoint(job, store, ranks, goes_on=job.resume or continues)
    trainer = _make_trainer(job)
    if found is None:
        load_shards(trainer.model, table_infos(job.bundle))
    training = ClusterTraining(job, trainer, store, found)
    result = training.train(listeners)
    trained = training.settle(result)
    written = ranks.on_first_slowly(
        lambda: _Written(
            write_trained(
                job.bundle, job.out, trained, config=job.config, data=job.data, force=force
            )
        )
    )
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
    return ClusterTrainer(
        sharded,
        model.flat,
        layout,
        config,
        train_rows=job.data.train,
        valid_rows=job.data.valid,
    )
