"""The constants of the cost model that no data sheet gives. Sources: docs/prediction.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dmt_convert.errors import ConfigError

_SHARES = (
    "compute_efficiency",
    "lookup_efficiency",
    "copy_efficiency",
    "cross_efficiency",
    "intra_efficiency",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a step reaches of the peaks, and what it pays besides bytes and FLOPs."""

    compute_efficiency: float = 0.4
    """Share of the peak FLOP/s that MLPs, interaction and tower modules reach."""
    lookup_efficiency: float = 0.5
    """Share of the peak memory bandwidth that lookups and updates of random rows reach."""
    copy_efficiency: float = 0.85
    """Share of the peak memory bandwidth that copies of whole vectors reach."""
    cross_efficiency: float = 0.97
    """Share of its network rate that a rank reaches with large messages."""
    intra_efficiency: float = 0.82
    """Share of its rate inside the host that a rank reaches with large messages."""
    scale_loss: float = 0.03
    """What every doubling of the ranks in one AlltoAll between hosts adds to the time per byte, as
    a share of the time per byte between two ranks."""
    launch_us: float = 8.4
    """Time of a collective that carries nothing, in microseconds."""
    cross_message_us: float = 2.7
    """What each peer on another host adds to an AlltoAll, in microseconds."""
    intra_message_us: float = 0.6
    """What each peer on the same host adds to an AlltoAll, in microseconds."""
    cross_hop_us: float = 14.0
    """One step of an all-reduce between hosts, in microseconds."""
    intra_hop_us: float = 3.4
    """One step of an all-reduce inside a host, in microseconds."""
    step_overhead_us: float = 500.0
    """What every step pays whatever its size (kernel launches, input, optimizer), in
    microseconds."""
    prefetch: float = 1.0
    """Share of the index exchange that may run during the step before (0: none)."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value!r}"
            for name, value in asdict(self).items()
            if not math.isfinite(value)
            or value < 0
            or (name in _SHARES and not 0 < value <= 1)
            or (name == "prefetch" and value > 1)
        ]
        if wrong:
            raise ConfigError(
                "no step has these constants: " + ", ".join(wrong),
                expected="efficiencies above 0 and at most 1, prefetch between 0 and 1, all else "
                "0 or more",
                hint="check --assume",
            )

    def override(self, settings: Sequence[str]) -> Assumptions:
        """Return these constants with some replaced.

        Args:
            settings: NAME=VALUE each.

        Raises:
            ConfigError: A setting is not of that form, or names no constant.
        """
        names = [field.name for field in fields(self)]
        values: dict[str, Any] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            value = _number(text)
            if not equals or name not in names or value is None:
                raise ConfigError(
                    f"--assume {setting}",
                    expected="NAME=NUMBER with one of the names " + ", ".join(names),
                    hint="an example: --assume compute_efficiency=0.3",
                )
            values[name] = value
        return replace(self, **values)

    def to_json(self) -> Mapping[str, float]:
        """Return name and value of every constant."""
        return asdict(self)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
