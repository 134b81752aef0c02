"""How each thing that is known of a model was come by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["read", "inferred", "assumed", "given"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that is known of the model, and why."""

    subject: str
    """What it is about."""
    value: str
    """What is the case."""
    source: Source
    """read: from the checkpoint; inferred: only this fits; assumed: the trainer's documented
    default; given: by the user."""
    reason: str
    """Why, in one line."""
