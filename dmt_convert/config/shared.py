"""Settings that several commands share."""

from __future__ import annotations

from typing import Any, Final

from dmt_convert.config.base import Config
from dmt_convert.config.fields import setting
from dmt_convert.config.values import Float, Outliers, PathValue

_CLUSTER: Final = "Cluster"
_MODEL: Final = "Facts about the model"


class ModelOptions(Config):
    """What the user says of a model that its checkpoint does not."""

    model_facts: PathValue | dict[str, Any] | None = setting(
        None,
        "YAML file with facts that the checkpoint does not store (feature order, pooling, ...).",
        alias="model_config",
        metavar="FILE.yaml",
        panel=_MODEL,
    )
    model: PathValue | None = setting(
        None,
        "Python file that builds a model of your own (docs/capture.md), or describes its dense "
        "part (docs/adapters.md). The file is run.",
        metavar="FILE.py",
        panel=_MODEL,
    )


class ScoringOptions(ModelOptions):
    """What the user says of a model that is run: a flat checkpoint, a bundle or an export."""

    trust_code: bool = setting(
        False,
        "Run the machine code of a pt2 export; give it for exports that you made, or whose makers "
        "you trust.",
    )
    outliers: Outliers = setting(
        "refuse",
        "Whether weights may hold single values that are absurd beside all others, as a flipped "
        "bit leaves them.",
    )


class BundleOptions(Config):
    """What a command on a bundle needs to know of its model."""

    model: PathValue | None = setting(
        None,
        "Python file that defines the bundle's own model, if it has one. The file is run.",
        metavar="FILE.py",
    )


class ClusterOptions(Config):
    """The cluster that towers are placed on."""

    hosts: int | None = setting(
        None, "Hosts of the cluster.", ge=1, auto="one per tower", panel=_CLUSTER
    )
    ranks_per_host: int | None = setting(
        None, "Ranks (GPUs) per host.", ge=1, auto="8", panel=_CLUSTER
    )
    hbm_gib: Float | None = setting(
        None, "Memory per rank in GiB.", gt=0, auto="80", panel=_CLUSTER
    )
