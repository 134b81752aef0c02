"""What a conversion is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmt_convert.conversion.partition import PartitionConfig
from dmt_convert.families import ModelConfig
from dmt_convert.placement import Cluster
from dmt_convert.spec import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """What `dmt convert` is asked for."""

    partition: PartitionConfig
    """How features become towers."""
    own_strategy: bool = True
    """Whether the strategy is the user's; else it is `diverse` where towers may combine features,
    since those that the model pairs strongly are then better kept apart."""
    tower_module: Literal["auto", "passthrough", "dlrm", "dcn", "linear"] = "auto"
    """Kind of tower module."""
    c: int | None = None
    """Vectors per feature."""
    p: int | None = None
    """Vectors per tower."""
    dim: int | None = None
    """Output dim D."""
    compression: float | None = None
    """Compression to reach, instead of `dim`."""
    calibration: Path | None = None
    """Data to measure moments and agreement on."""
    distill_steps: int | None = None
    """Steps of distillation after the closed form; None: as many as cost little."""
    cluster: Cluster | None = None
    """Cluster to plan for; by default one host of 8 ranks per tower."""
    dtype: Dtype | None = None
    """Store tables in this type."""
    optimizer_state: Literal["keep", "drop"] = "keep"
    """Whether Adagrad's accumulators of the tables go into the bundle."""
    model_config: ModelConfig | None = None
    """What the user says of the model."""
    seed: int = 0
    """Seed of everything random."""
    force: bool = False
    """Replace a bundle that is there."""
