"""How long work reports progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the current step, the units that are done, and the units in total
(0 if the total is unknown)."""


def no_progress(step: str, done: int, total: int) -> None:
    """Report nothing."""
