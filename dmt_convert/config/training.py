"""Settings of fine-tuning: of a run, and of how it is launched."""

from __future__ import annotations

import math
import shlex
from typing import ClassVar, Final, Self

from pydantic import model_validator

from dmt_convert.config.base import Config
from dmt_convert.config.fields import setting
from dmt_convert.config.shared import BundleOptions
from dmt_convert.config.values import (
    Backend,
    Decay,
    DenseCommDtype,
    DenseOptimizerKind,
    Float,
    NumaBinding,
    PathValue,
    TableOptimizerKind,
    TeacherValue,
)
from dmt_convert.spec import CommDtype, MatmulPrecision

_TRAINING: Final = "Training"
_RANKS: Final = "Over ranks"


_EVALUATIONS: Final = 10
"""Evaluations per pass over the data, unless `eval_every` says otherwise."""


class TrainingConfig(Config):
    """How a model is trained."""

    command: ClassVar[str] = "finetune"
    alternatives: ClassVar[tuple[str, ...]] = ("epochs", "max_steps")

    epochs: int = setting(1, "Passes over the training rows.", ge=1, panel=_TRAINING)
    max_steps: int | None = setting(
        None, "Steps to take, instead of passes.", ge=1, panel=_TRAINING, auto="as --epochs says"
    )
    batch_size: int = setting(512, "Rows per step, over all ranks.", ge=1, panel=_TRAINING)
    eval_every: int | None = setting(
        None, "Steps between evaluations.", ge=1, panel=_TRAINING, auto="a tenth of a pass"
    )
    patience: int | None = setting(
        10, "Evaluations without improvement before training stops.", ge=1, panel=_TRAINING
    )
    dense_lr: Float = setting(
        5e-4,
        "Learning rate of everything but tables; 0 freezes it.",
        ge=0,
        panel=_TRAINING,
        auto="0.0005; 0 if neither rate is given and the bundle agrees with the flat model",
    )
    dense_optimizer: DenseOptimizerKind = setting(
        "adam", "Optimizer of everything but tables.", panel=_TRAINING
    )
    table_lr: Float = setting(
        0.02,
        "Learning rate of the embedding tables; 0 freezes them.",
        ge=0,
        panel=_TRAINING,
        auto="0.02; 0.002 if neither rate is given and the bundle agrees with the flat model",
    )
    table_optimizer: TableOptimizerKind = setting(
        "rowwise-adagrad", "Optimizer of the embedding tables.", panel=_TRAINING
    )
    initial_accumulator: Float | None = setting(
        None,
        "Adagrad: start value of the squared gradients.",
        ge=0,
        panel=_TRAINING,
        auto="the bundle's accumulators, else measured on the first batch",
    )
    warmup_steps: int = setting(
        0, "Steps over which learning rates rise from 0.", ge=0, panel=_TRAINING
    )
    lr_decay: Decay = setting(
        "linear", "How learning rates fall after the warm-up.", panel=_TRAINING
    )
    teacher_weight: Float = setting(
        0.5,
        "Weight of the teacher's probabilities against the labels; 0: labels alone.",
        ge=0,
        le=1,
        panel=_TRAINING,
    )
    clip_norm: Float | None = setting(
        None,
        "Largest gradient norm of everything but tables.",
        gt=0,
        panel=_TRAINING,
        auto="unlimited",
    )
    seed: int = setting(0, "Seed of the order of rows.", ge=0, panel=_TRAINING)
    comm_dtype: CommDtype | None = setting(
        None,
        "Precision between hosts of tower outputs without a code, and of all gradients.",
        panel=_RANKS,
        auto="fp32; gradients of coded towers as their code",
    )
    dense_comm_dtype: DenseCommDtype = setting(
        "fp32", "Precision of dense gradients that ranks average.", panel=_RANKS
    )
    matmul_precision: MatmulPrecision | None = setting(
        None,
        "Precision of float32 matrix products: float32, TF32 (high) or bf16 (medium).",
        panel=_RANKS,
        auto="high on GPUs",
    )
    checkpoint_every: int | None = setting(
        None,
        "Steps between training checkpoints.",
        ge=1,
        panel=_RANKS,
        auto="as --checkpoint-minutes says",
    )
    checkpoint_minutes: Float = setting(
        10.0, "Minutes between training checkpoints; 0: only best states.", ge=0, panel=_RANKS
    )
    keep_checkpoints: int = setting(
        2, "Checkpoints to keep beside the best one.", ge=1, panel=_RANKS
    )
    async_checkpoints: bool = setting(
        False, "Write checkpoints while training goes on.", panel=_RANKS
    )
    prefetch: bool = setting(True, "Send the ids of the next batch ahead of time.", panel=_RANKS)

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between training checkpoints; None: they are not written by the clock."""
        if self.checkpoint_every is not None or not self.checkpoint_minutes:
            return None
        return 60.0 * self.checkpoint_minutes

    def total_steps(self, num_rows: int) -> int:
        """Return the largest number of steps that training takes.

        Args:
            num_rows: Training rows.
        """
        if self.max_steps is not None:
            return self.max_steps
        return self.epochs * math.ceil(num_rows / self.batch_size)

    def steps_between_evaluations(self, num_rows: int) -> int:
        """Return the steps between evaluations.

        Args:
            num_rows: Training rows.
        """
        if self.eval_every is not None:
            return self.eval_every
        one_pass = math.ceil(num_rows / self.batch_size)
        return max(1, min(one_pass, self.total_steps(num_rows)) // _EVALUATIONS)

    def lr_factor(self, step: int, total: int) -> float:
        """Return the factor of the learning rates at a step.

        Args:
            step: The step, from 1.
            total: Steps in total.
        """
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.lr_decay == "constant":
            return 1.0
        done = (step - 1 - self.warmup_steps) / max(1, total - self.warmup_steps)
        if self.lr_decay == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class RunConfig(BundleOptions, TrainingConfig):
    """A training run: what the recipe `finetune_dmt.py` is given beside the bundle."""

    data: PathValue = setting(..., "Labelled rows, or a folder with train.npz.")
    valid: PathValue | None = setting(
        None, "Validation rows.", auto="the last tenth of DATA", metavar="DATA"
    )
    teacher: TeacherValue = setting(
        "auto",
        "Flat model to learn from beside the labels: the checkpoint that the bundle was made "
        "from; none: labels alone.",
        auto="that checkpoint, if it lies beside the bundle",
        metavar="auto|none|CKPT",
        panel=_TRAINING,
    )
    out: PathValue | None = setting(
        None, "Bundle to write.", auto="BUNDLE-tuned", metavar="DIR", record=False
    )
    log: PathValue | None = setting(
        None,
        "Folder for metrics.jsonl and TensorBoard.",
        panel=_TRAINING,
        auto="CHECKPOINTS/log",
        metavar="DIR",
    )
    plan: PathValue | None = setting(
        None,
        "plan.json to place towers by.",
        panel=_RANKS,
        auto="the bundle's if it fits the ranks, else a new one",
        metavar="FILE",
    )
    backend: Backend | None = setting(
        None, "Backend of torch.distributed.", panel=_RANKS, auto="nccl if there are GPUs"
    )
    checkpoints: PathValue | None = setting(
        None,
        "Folder of training checkpoints.",
        panel=_RANKS,
        auto="OUT.checkpoints",
        metavar="DIR",
    )
    resume: bool = setting(
        False, "Continue from the newest checkpoint, if there is one.", panel=_RANKS
    )
    timeout: Float = setting(600.0, "Seconds that ranks wait for each other.", gt=0, panel=_RANKS)
    force: bool = setting(
        False, "Replace an existing bundle and existing checkpoints.", record=False
    )


class LaunchConfig(Config):
    """How ranks are started on this host, by torchrun."""

    nproc: int = setting(1, "Ranks (GPUs) on this host.", ge=1, record=False)
    nnodes: int = setting(1, "Hosts; run the command on each of them.", ge=1, record=False)
    node_rank: int = setting(0, "Index of this host, from 0.", ge=0, record=False)
    rdzv_endpoint: str | None = setting(
        None,
        "Address at which hosts meet: host 0 and any free port.",
        metavar="HOST:PORT",
        record=False,
    )
    local_addr: str | None = setting(
        None, "Address of this host for the others.", auto="its host name", record=False
    )
    rdzv_timeout: int = setting(300, "Seconds that hosts wait for each other.", ge=1, record=False)
    max_restarts: int = setting(
        0, "How often to continue after a rank is lost.", ge=0, record=False
    )
    shutdown_timeout: int = setting(
        30, "Seconds that ranks have to end before they are killed.", ge=1, record=False
    )
    numa_binding: NumaBinding | None = setting(
        None,
        "Which CPU cores a rank may use: those near its GPU, as torchrun has it.",
        auto="node on GPUs, if numactl is installed and the host has several NUMA nodes",
        record=False,
    )
    torchrun_args: str | None = setting(
        None,
        "Further arguments of torchrun, in one string.",
        metavar="ARGS",
        record=False,
    )

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank must be 0 to {self.nnodes - 1}, as --nnodes is {self.nnodes}"
            )
        if self.rdzv_endpoint is None and self.nnodes > 1:
            raise ValueError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint: HOST:PORT of host 0, the same on "
                "every host, for example host0.cluster:29400"
            )
        if self.rdzv_endpoint is not None and not _is_endpoint(self.rdzv_endpoint):
            raise ValueError(f"rdzv_endpoint must be HOST:PORT, got {self.rdzv_endpoint!r}")
        try:
            shlex.split(self.torchrun_args or "")
        except ValueError as error:
            raise ValueError(f"torchrun_args cannot be split into words: {error}") from None
        return self


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


class FinetuneConfig(LaunchConfig, RunConfig):
    """Settings of `dmt finetune`."""
