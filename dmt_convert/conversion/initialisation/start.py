"""The starting weights of a converted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Weights that differ from the flat model's."""

    modules: Sequence[Mapping[str, Array]]
    """State of every tower's module, by name."""
    dense: Mapping[str, Array] = field(default_factory=dict)
    """Changed or new weights outside towers, by canonical name."""
    notes: tuple[str, ...] = ()
    """What was done, one line each."""
