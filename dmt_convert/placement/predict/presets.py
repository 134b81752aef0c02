"""Accelerators that a step can be predicted for, one row each. Sources: docs/prediction.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from dmt_convert.errors import ConfigError
from dmt_convert.placement import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator, and the links that it usually has."""

    name: str
    """What `--gpu` calls it."""
    flops_per_s: float
    """Peak of dense float32 matrix products as trainers run them by default, in FLOP/s: TF32
    where the hardware has it, without sparsity."""
    hbm_bytes: int
    """Memory, in bytes."""
    hbm_bytes_per_s: float
    """Peak memory bandwidth, in bytes/s."""
    intra_gbps: float
    """Peak to the other ranks of its host, one direction, in gigabit/s."""
    inter_gbps: float
    """Its share of the host's network cards, one direction, in gigabit/s."""

    def __post_init__(self) -> None:
        numbers = {
            "flops_per_s": self.flops_per_s,
            "hbm_bytes": self.hbm_bytes,
            "hbm_bytes_per_s": self.hbm_bytes_per_s,
            "intra_gbps": self.intra_gbps,
            "inter_gbps": self.inter_gbps,
        }
        wrong = [
            f"{name} is {value!r}"
            for name, value in numbers.items()
            if not (math.isfinite(value) and value > 0)
        ]
        if wrong:
            raise ConfigError(
                f"no accelerator {self.name!r} has these numbers: " + ", ".join(wrong),
                expected="positive finite numbers",
                hint="take one of the presets, such as h100",
            )


GPUS: Final[tuple[Gpu, ...]] = (
    Gpu(
        name="v100",
        flops_per_s=15.7e12,
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=900e9,
        intra_gbps=1200.0,
        inter_gbps=50.0,
    ),
    Gpu(
        name="a100",
        flops_per_s=156e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=2039e9,
        intra_gbps=2400.0,
        inter_gbps=200.0,
    ),
    Gpu(
        name="h100",
        flops_per_s=494.7e12,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=3350e9,
        intra_gbps=3600.0,
        inter_gbps=400.0,
    ),
)


def find_gpu(name: str) -> Gpu:
    """Return the preset of that name, in whatever case.

    Raises:
        ConfigError: There is none.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise ConfigError(
        f"--gpu {name}",
        expected="one of " + ", ".join(gpu.name for gpu in GPUS),
        hint="take the nearest one and override its numbers, such as --inter-gbps and --assume",
    )
