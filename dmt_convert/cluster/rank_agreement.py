"""Ranks that succeed or fail together: what goes wrong on one is raised on all.

Objects travel over a gloo group of their own, on the CPU, so that they cross neither the training's
collectives nor need a GPU.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed as dist

from dmt_convert.errors import DmtError

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What came of some work on one rank; crosses to others."""

    value: Any = None
    """What it gave."""
    refusal: tuple[type[DmtError], str, str, str, tuple[str, ...]] | None = None
    """A `DmtError`, in parts."""
    fault: str | None = None
    """The traceback of anything else."""

    def unwrap(self, rank: int) -> Any:
        """Return the value, or raise what was raised on `rank`."""
        if self.refusal is not None:
            kind, found, expected, hint, details = self.refusal
            raise kind(found, expected=expected, hint=hint, details=details)
        if self.fault is not None:
            raise RuntimeError(f"rank {rank} failed:\n{self.fault}")
        return self.value


class Ranks:
    """The ranks of a job, for what they do together beside training.

    Making one is collective over all ranks of the group.

    Args:
        group: Which ranks; None: all.
        timeout: How long a rank waits for the others before it gives up with a RuntimeError.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        members = None if group is None else dist.get_process_group_ranks(group)
        self.group = dist.new_group(
            members,
            backend="gloo",
            timeout=timeout,
            use_local_synchronization=group is not None,
        )
        self._timeout = timeout
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints for all."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank only; all get its result.

        Raises:
            DmtError: It was raised there; on all ranks alike.
            RuntimeError: Anything else was raised there, or a rank is lost.
        """
        error: Exception | None = None
        boxes: list[_Outcome | None] = [None]
        if self.is_first:
            boxes[0], error = _attempt(work)
        first = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(boxes, src=first, group=self.group)
        if error is not None:
            raise error
        assert boxes[0] is not None
        result: T = boxes[0].unwrap(0)
        return result

    def on_first_slowly(self, work: Callable[[], T]) -> T:
        """Do something on the first rank that may take longer than ranks wait for each other.

        That it is alive, a thread of the first rank tells the others meanwhile.

        Raises:
            DmtError: It was raised there; on all ranks alike.
            RuntimeError: Anything else was raised there, or a rank is lost.
        """
        if not self.is_first:
            while not self.on_first(lambda: True):
                pass
            return self.on_first(work)
        done = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="alive") as pool:
            alive = pool.submit(self._say_alive, done)
            found, error = _attempt(work)
            done.set()
            alive.result()

        def give() -> T:
            if error is not None:
                raise error
            value: T = found.value
            return value

        return self.on_first(give)

    def _say_alive(self, done: threading.Event) -> None:
        while not done.wait(self._timeout.total_seconds() / 4):
            self.on_first(lambda: False)
        self.on_first(lambda: True)

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank; all get the results, in the order of ranks.

        Raises:
            DmtError: It was raised on some rank; the first such rank's, on all alike.
            RuntimeError: Anything else was raised on some rank, or a rank is lost.
        """
        mine, error = _attempt(work)
        found: list[_Outcome | None] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        outcomes = [outcome for outcome in found if outcome is not None]
        for rank, outcome in enumerate(outcomes):
            if rank == self.rank and error is not None:
                raise error
            outcome.unwrap(rank)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        """Give the group back; nothing can be done together afterwards."""
        dist.destroy_process_group(self.group)


def _attempt(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    try:
        return _Outcome(value=work()), None
    except DmtError as error:
        parts = (type(error), error.found, error.expected, error.hint, error.details)
        return _Outcome(refusal=parts), error
    except Exception as error:
        return _Outcome(fault=traceback.format_exc()), error
