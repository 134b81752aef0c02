"""A folder of training checkpoints that all ranks write to: whole or not there, whatever is killed.

All methods but `poll` are collective: every rank calls them, in the same order. What goes wrong on
one rank is raised on all, so that none waits for another.

Letters: R rows of a table, k column shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from dmt_convert.checkpoint import TensorInfo
from dmt_convert.cluster.checkpoint_folder import (
    CheckpointFolder,
    DamagedCheckpointError,
    SavedCheckpoint,
    check_share,
    os_refusal,
    read_payload,
    refuse_os_errors,
)
from dmt_convert.cluster.checkpoint_tensors import (
    CheckedReader,
    StagedPlanner,
    SyncedWriter,
    describe_misfits,
    flatten_tensors,
    make_planner,
)
from dmt_convert.cluster.faults import PeerFailedError
from dmt_convert.cluster.optimizers import SUFFIX, mean_sums
from dmt_convert.cluster.ranks import DEFAULT_TIMEOUT, Ranks
from dmt_convert.errors import CheckpointError

logger = logging.getLogger(__name__)

_MAX_DETAILS: Final = 10


class CheckpointStore:
    """Training checkpoints in a folder that all ranks reach.

    Opening one is collective, makes the folder if it is missing, and removes what a killed
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
        self._writer = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=_device_setter()
        )
        self._pending: Future[None] | None = None
        self._checked: Path | None = None
        """A checkpoint whose digests were compared just now."""
        self.notes: list[str] = []
        """What was set aside, and what was taken instead."""

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        progress: Mapping[str, Any],
        *,
        asynchronous: bool = False,
        protect: Collection[int] = (),
    ) -> None:
        """Save a checkpoint, and remove the oldest if there are more than are kept.

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
        """Return the newest checkpoint that holds what was written; None if there is none at all.

        All its files are read and compared with their digests. Later ones that are damaged are
        set aside (renamed, never removed), with a warning.

        Args:
            before: Only one of an earlier step.

        Raises:
            CheckpointError: All are damaged, which changes nothing; or a file cannot be read.
        """
        self.wait()
        damage: dict[int, str] = {}
        while True:
            found, damage = self._ranks.on_first(
                lambda: self._first.newest(before=before, damage=damage)  # noqa: B023
            )
            if found is None:
                if damage:
                    raise _none_whole(self._path, damage)
                return None
            fault = self._find_damage(found)
            if fault is None:
                self._set_aside(damage, found)
                self._checked = found.path
                return found
            damage[found.step] = fault.found

    def at(self, step: int) -> SavedCheckpoint | None:
        """Return the checkpoint of a step, compared with its digests; None if there is none.

        Raises:
            DamagedCheckpointError: It is damaged.
            CheckpointError: A file cannot be read.
        """
        self.wait()
        found = self._ranks.on_first(lambda: self._first.at(step))
        fault = None if found is None else self._find_damage(found)
        if fault is not None:
            raise fault
        return found

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, whole or damaged, in order."""
        self.wait()
        return self._ranks.on_first(lambda: self._first.steps())

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is never read; returns its new path."""
        self.wait()
        return self._ranks.on_first(lambda: self._first.set_aside(step))

    def _find_damage(self, saved: SavedCheckpoint) -> DamagedCheckpointError | None:
        """Read a checkpoint, every rank a share of its files; returns what is damaged."""

        def check() -> DamagedCheckpointError | None:
            try:
                with refuse_os_errors(saved.path, "read"):
                    check_share(saved, self._ranks.rank, self._ranks.size)
            except DamagedCheckpointError as error:
                return error
            return None

        return next((fault for fault in self._ranks.on_all(check) if fault is not None), None)

    def _set_aside(self, damage: Mapping[int, str], taken: SavedCheckpoint) -> None:
        for step, fault in sorted(damage.items()):
            aside = self.set_aside(step)
            note = f"{fault}; it is set aside as {aside.name}, and step {taken.step} is taken"
            logger.warning("%s", note)
            self.notes.append(note)

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
        fault = None if self._checked == saved.path else self._find_damage(saved)
        self._checked = None
        if fault is not None:
            raise fault
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
            raise _explain(error, saved.path, "read", self._ranks.rank) from None
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
        writer = SyncedWriter(partial)
        try:
            state_dict_saver.save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=self._ranks.group,
            )
        except CheckpointException as error:
            self._ranks.on_first(lambda: self._first.abandon(step))
            raise _explain(error, self._path, "written to", self._ranks.rank) from None
        digests: dict[str, str] = {}
        for written in self._ranks.on_all(lambda: writer.digests):
            digests |= written
        self._ranks.on_first(self._named(step, progress, digests, protect))

    def _named(
        self,
        step: int,
        progress: Mapping[str, Any],
        digests: Mapping[str, str],
        protect: Collection[int],
    ) -> Callable[[], None]:
        def name() -> None:
            try:
                self._first.complete(step, progress, num_ranks=self._ranks.size, digests=digests)
            except CheckpointError:
                self._first.abandon(step)
                raise
            self._first.prune(self._keep, protect)

        return name


def _device_setter() -> Callable[[], None] | None:
    """Return what lets another thread use this one's GPU: threads start with the first."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _none_whole(folder: Path, damage: Mapping[int, str]) -> CheckpointError:
    return CheckpointError(
        f"all {len(damage)} checkpoints in {folder} are damaged; nothing was changed",
        expected="one that holds what was written, to go on from",
        hint="bring one back from a backup; or give another --checkpoints folder, or --force "
        "without --resume, which removes them, to start again from step 0",
        details=[fault for _, fault in sorted(damage.items(), reverse=True)],
    )


def _open_checked(saved: SavedCheckpoint, tensors: Mapping[str, Tensor]) -> CheckedReader:
    """Open a checkpoint as data, and refuse one that has not these tensors."""
    checkpoint = read_payload(saved.path)
    misfits = describe_misfits(tensors, checkpoint)
    if misfits:
        more = len(misfits) - _MAX_DETAILS
        raise CheckpointError(
            f"{saved.path} lacks {len(misfits)} of the {len(tensors)} tensors to load",
            expected="a checkpoint of this model, with these optimizers",
            hint="resume with the model and the settings that it was saved with, or start again "
            "in another folder",
            details=[*misfits[:_MAX_DETAILS], *([f"and {more} more"] if more > 0 else [])],
        )
    return CheckedReader(checkpoint)


def _explain(error: CheckpointException, folder: Path, done: str, own_rank: int) -> BaseException:
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
            hint="run it again with --resume; if it stays so, the checkpoint is damaged: rename "
            "its folder, and training goes on from the one before",
        )
    return (RuntimeError if own_rank in causes else PeerFailedError)(str(error))


def load_resharded(
    store: CheckpointStore,
    saved: SavedCheckpoint,
    state: Mapping[str, Any],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """Load a checkpoint into a model that may be cut in another way; all ranks at once.

    DCP takes shards of tables from wherever they lie. Row-wise Adagrad's sums of squared gradients
    are another matter: TorchRec keeps one number per row and column shard, side by side in one
    vector, so that its length depends on how a table was cut. If the cut changed, every shard takes
    the mean over the old ones: each is the mean of squares over its own columns, and all have the
    same width.

    Args:
        store: The checkpoints.
        saved: The one to load.
        state: Nested dicts of tensors, as they were saved; perhaps cut in another way.
        rows: Table -> R.

    Returns:
        What was saved as progress.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    tensors = flatten_tensors(state)
    stored = {info.path: info for info in read_payload(saved.path).tensors}
    names = {f".{t}.weight.{t}{SUFFIX}": count for t, count in rows.items()}
    recut = {
        name: (tensor, stored[name], names[_tail(name)])
        for name, tensor in tensors.items()
        if name.endswith(SUFFIX)
        and name in stored
        and len(stored[name].shape) == 1
        and stored[name].shape != tuple(tensor.shape)
    }
    progress = store.load(saved, {n: t for n, t in tensors.items() if n not in recut})
    for tensor, info, count in recut.values():
        _average(tensor, info, count)
    return progress


def _tail(name: str) -> str:
    return "." + name.split(".embedding_bags.", 1)[1]


def _average(tensor: Any, info: TensorInfo, rows: int) -> None:
    """Fill this rank's shards with the mean over the old column shards."""
    parts = tensor.local_shards()
    if not parts:
        return
    mean = torch.from_numpy(mean_sums(info, rows).reshape(-1))
    for part in parts:
        (start,) = part.metadata.shard_offsets
        first = int(start) % rows
        part.tensor.copy_(mean[first : first + len(part.tensor)])
