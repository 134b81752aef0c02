"""Checkpoints of a training over many ranks: whole or not there, whatever is killed when.

All methods but `poll` are collective: every rank calls them, in the same order. What goes wrong on
one rank is raised on all, so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dmt_convert.cluster.checkpoint_folder import CheckpointFolder
from dmt_convert.cluster.checkpoint_tensors import (
    CheckedReader,
    StagedPlanner,
    SyncedWriter,
    describe_misfits,
    flatten_tensors,
    make_planner,
)
from dmt_convert.cluster.rank_agreement import DEFAULT_TIMEOUT, Ranks
from dmt_convert.cluster.saved_checkpoint import SavedCheckpoint, os_refusal, read_payload
from dmt_convert.errors import CheckpointError

_MAX_DETAILS = 10


class CheckpointStore:
    """Training checkpoints in a folder that all ranks reach.

    Opening one is collective, makes the folder where it is missing, and removes what a killed
    training left half-written.

    Args:
        folder: The folder, as the first rank sees it; every host has to have it under this path.
        keep: How many whole checkpoints stay, at least 1.
        group: The ranks that train; None: all.
        timeout: How long a rank waits for the slowest one to write before it gives up.

    Raises:
        CheckpointError: The folder cannot be written to, or another training writes to it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        assert keep >= 1
        self._keep = keep
        self._ranks = Ranks(group, timeout=timeout)
        self._folder: CheckpointFolder | None = None
        self._path = self._ranks.on_first(lambda: self._open(folder))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        progress: Mapping[str, Any],
        *,
        asynchronous: bool = False,
        protect: Collection[int] = (),
    ) -> None:
        """Save a checkpoint, and remove the oldest where there are more than are kept.

        Args:
            step: Training steps done; above that of every whole checkpoint, or equal to the last.
            state: Nested dicts of tensors: plain ones (the same on all ranks that have them),
                DTensor or ShardedTensor.
            progress: What else training needs to go on, JSON-able; the first rank's is kept.
            protect: Steps whose checkpoints stay, however many are newer.
            asynchronous: Return once the tensors are copied to CPU memory, and write in the
                background. What goes wrong there is raised by the next `save` or `wait`.

        Raises:
            CheckpointError: The disk is full or cannot be written to, or the folder has a later
                checkpoint. Earlier ones are still there.
            TypeError: The state holds something else than tensors.
            RuntimeError: A rank is lost.
        """
        self.wait()
        tensors = flatten_tensors(state)
        kept = dict(progress)
        partial = self._ranks.on_first(lambda: self._first.begin(step))
        if not asynchronous:
            self._write(step, partial, tensors, make_planner(), kept, protect)
            return
        staged: list[StagedPlanner] = []
        self._ranks.on_all(lambda: staged.append(StagedPlanner(tensors)))
        self._pending = self._writer.submit(
            self._write, step, partial, tensors, staged.pop(), kept, tuple(protect)
        )

    def poll(self) -> bool:
        """Tell whether this rank is done with writing; raises nothing, and waits for nobody."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Wait for what is written in the background.

        Raises:
            CheckpointError: It could not be written.
            RuntimeError: A rank is lost.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self, *, before: int | None = None) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint, None where there is none; damaged ones are noted.

        Args:
            before: Only one of an earlier step.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        self.wait()
        return self._ranks.on_first(lambda: self._first.newest(before=before))

    def load(self, saved: SavedCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
        """Load into tensors in place, however they are sharded now.

        Args:
            saved: A checkpoint of this folder, by any number of ranks.
            state: As for `save`; may hold fewer tensors than were saved.

        Returns:
            What was given to `save` as progress.

        Raises:
            CheckpointError: It is damaged, or has not these tensors in these shapes and types.
            RuntimeError: A rank is lost.
        """
        self.wait()
        tensors = flatten_tensors(state)
        readers: list[CheckedReader] = []
        self._ranks.on_all(lambda: readers.append(_open_checked(saved, tensors)))
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        try:
            state_dict_loader.load(
                dict(tensors),
                storage_reader=readers.pop(),
                planner=planner,
                process_group=self._ranks.group,
            )
        except CheckpointException as error:
            raise _refusal(error, saved.path, "read") from None
        return dict(saved.progress)

    def prune(self) -> None:
        """Remove all but the newest whole checkpoints that are kept; `save` does it as well."""
        self.wait()
        self._ranks.on_first(lambda: self._first.prune(self._keep))

    def discard_after(self, step: int) -> None:
        """Remove all checkpoints of later steps, when training goes on from an earlier one."""
        self.wait()
        self._ranks.on_first(lambda: self._first.discard_after(step))

    def close(self) -> None:
        """Finish what is being written, and let others write to the folder.

        Raises:
            CheckpointError: What was written in the background could not be.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._folder is not None:
                self._folder.close()
            self._ranks.close()

    @property
    def _first(self) -> CheckpointFolder:
        assert self._folder is not None, "only the first rank names checkpoints"
        return self._folder

    def _open(self, folder: Path) -> Path:
        self._folder = CheckpointFolder(folder)
        return self._folder.path

    def _write(
        self,
        step: int,
        partial: Path,
        tensors: Mapping[str, Tensor],
        planner: DefaultSavePlanner,
        progress: Mapping[str, Any],
        protect: Collection[int],
    ) -> None:
        """Write a rank's part; the first rank then gives the checkpoint its name."""
        try:
            state_dict_saver.save(
                dict(tensors),
                storage_writer=SyncedWriter(partial),
                planner=planner,
                process_group=self._ranks.group,
            )
        except CheckpointException as error:
            self._ranks.on_first(lambda: self._first.abandon(step))
            raise _refusal(error, self._path, "written to") from None
        self._ranks.on_first(self._named(step, progress, protect))

    def _named(
        self, step: int, progress: Mapping[str, Any], protect: Collection[int]
    ) -> Callable[[], None]:
        def name() -> None:
            try:
                self._first.complete(step, progress, num_ranks=self._ranks.size)
            except CheckpointError:
                self._first.abandon(step)
                raise
            self._first.prune(self._keep, protect)

        return name


def _open_checked(saved: SavedCheckpoint, tensors: Mapping[str, Tensor]) -> CheckedReader:
    """Open a checkpoint as data, and refuse one that has not these tensors."""
    checkpoint = read_payload(saved.path)
    misfits = describe_misfits(tensors, checkpoint)
    if misfits:
        more = len(misfits) - _MAX_DETAILS
        raise CheckpointError(
            f"{saved.path} lacks {len(misfits)} of the {len(tensors)} tensors to load",
            expected="a checkpoint of this model, with these optimizers",
            hint="resume with the model and the settings that it was saved with, or start anew "
            "in another folder",
            details=[*misfits[:_MAX_DETAILS], *([f"and {more} more"] if more > 0 else [])],
        )
    return CheckedReader(checkpoint)


def _refusal(error: CheckpointException, folder: Path, done: str) -> BaseException:
    """Say what went wrong on the ranks, in the words of the first one that has any."""
    causes = {rank: failure[0] for rank, failure in sorted(error.failures.items())}
    for cause in causes.values():
        if isinstance(cause, KeyboardInterrupt):
            return cause
    for rank, cause in causes.items():
        if isinstance(cause, OSError):
            return os_refusal(cause, folder, done, where=f" on rank {rank}")
    if done == "read":
        rank, cause = next(iter(causes.items()))
        return CheckpointError(
            f"{folder} cannot be loaded on rank {rank} ({type(cause).__name__}: {cause})",
            expected="files as they were written",
            hint="the checkpoint is damaged: remove it, and training resumes from the one before",
        )
    return RuntimeError(str(error))
