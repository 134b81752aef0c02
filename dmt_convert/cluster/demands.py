"""What is asked of a training from outside: a checkpoint now and then, and to stop.

Schedulers that take a machine back send a signal, and kill some time later. A signal may reach one
rank only, and clocks differ, so ranks agree after every step on what to do: the largest demand of
any rank counts. The answer comes a step late, while which nobody waits for it.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Final

from dmt_convert.cluster.rank_process import STOP_REQUEST, StopRequest
from dmt_convert.cluster.ranks import Ranks

_LARGEST_SHARE: Final = 50
"""Checkpoints by time are at least this many times as far apart as one took to write."""


class Demand(enum.IntEnum):
    """What a training has to do after a step; the larger one includes the smaller."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Demands:
    """Ranks agree on what is asked of them.

    Args:
        ranks: All ranks.
        interval: Seconds between checkpoints, by the first rank's clock; None: by steps alone.
        request: The signal that came, if one did.
        clock: Gives seconds.
    """

    def __init__(
        self,
        ranks: Ranks,
        interval: float | None,
        *,
        request: StopRequest = STOP_REQUEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks, self._interval = ranks, interval
        self._request, self._clock = request, clock
        self._due = self._next_due(0.0)
        self._pending: Callable[[], int] | None = None

    def poll(self) -> Demand:
        """Return what any rank asked for by the step before; all ranks at once, after each step."""
        pending, self._pending = self._pending, self._ranks.start_max(self._own())
        return Demand.NOTHING if pending is None else Demand(pending())

    def saved(self, seconds: float) -> None:
        """Note that a checkpoint was written.

        Args:
            seconds: How long training waited for it.
        """
        self._due = self._next_due(seconds)

    def finish(self) -> None:
        """Take the last answer, so that nothing is under way any more."""
        if self._pending is not None:
            self._pending()
            self._pending = None

    def _own(self) -> Demand:
        if self._request.signal is not None:
            return Demand.STOP
        is_due = self._ranks.is_first and self._due is not None and self._clock() >= self._due
        return Demand.SAVE if is_due else Demand.NOTHING

    def _next_due(self, seconds: float) -> float | None:
        if self._interval is None:
            return None
        return self._clock() + max(self._interval, _LARGEST_SHARE * seconds)
