"""The machines that a model is placed on.

Letters: H hosts, R ranks (GPUs) per host, W = H * R world size, T towers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field, PositiveInt

from dmt_convert.errors import ConfigError

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A number of bytes, or of ids, per sample; checked when a file is read."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Speed of a link in gigabit/s; checked when a file is read."""

GIB: Final = 1024**3

HBM_RESERVE: Final = 0.15
"""Share of every rank's memory that is kept free of tables. It holds dense parameters with their
optimizer state, activations, communication buffers, and the allocator's fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """H hosts of R ranks each, all alike."""

    hosts: PositiveInt
    """H."""
    ranks_per_host: PositiveInt
    """R."""
    hbm_bytes: PositiveInt = 80 * GIB
    """Memory of one rank's accelerator, in bytes."""
    intra_gbps: Rate = 3600.0
    """What one rank can send to the other ranks of its host, in gigabit/s (NVLink class)."""
    inter_gbps: Rate = 200.0
    """What one rank can send to other hosts, in gigabit/s."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}"
            for name, value in (
                ("hosts", self.hosts),
                ("ranks_per_host", self.ranks_per_host),
                ("hbm_bytes", self.hbm_bytes),
            )
            if type(value) is not int or value < 1
        ]
        problems += [
            f"{name} is {value!r}"
            for name, value in (("intra_gbps", self.intra_gbps), ("inter_gbps", self.inter_gbps))
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0
        ]
        if problems:
            raise ConfigError(
                "invalid cluster: " + ", ".join(problems),
                expected="positive integers for hosts, ranks and bytes, positive finite speeds",
                hint="check --hosts, --ranks-per-host, --hbm-gib, --intra-gbps and --inter-gbps",
            )

    @property
    def world_size(self) -> int:
        """W."""
        return self.hosts * self.ranks_per_host

    @property
    def usable_bytes(self) -> int:
        """What tables and their optimizer state may take of one rank's memory, in bytes."""
        return max(1, int(self.hbm_bytes * (1 - HBM_RESERVE)))

    def host_of(self, rank: int) -> int:
        """Host of a global rank (ranks are numbered host by host)."""
        return rank // self.ranks_per_host


def default_cluster(num_towers: int) -> Cluster:
    """Return the cluster that is assumed if none is given: a host per tower, 8 ranks of 80 GiB.

    Args:
        num_towers: T, at least 1.
    """
    return Cluster(hosts=num_towers, ranks_per_host=8)


def show_bytes(count: float) -> str:
    """Write a number of bytes in the largest unit of which it has at least one."""
    units = (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024))
    for unit, size in units:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
