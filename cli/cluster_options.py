"""Options that describe a cluster, as `dmt convert` and `dmt plan` take them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmt_convert.placement import Cluster


def make_cluster(
    *,
    hosts: int,
    ranks_per_host: int,
    hbm_gib: float | None = None,
    intra_gbps: float | None = None,
    inter_gbps: float | None = None,
    gpu: str | None = None,
) -> Cluster:
    """Turn options into a cluster; what is None is the GPU's where one is named, else the default.

    Raises:
        ConfigError: No cluster has these numbers.
    """
    from dmt_convert.errors import ConfigError
    from dmt_convert.placement import GIB, Cluster
    from dmt_convert.placement.predict import find_gpu

    if hbm_gib is not None and not (math.isfinite(hbm_gib) and hbm_gib > 0):
        raise ConfigError(
            f"--hbm-gib {hbm_gib:g}",
            expected="the memory of one rank in GiB, above 0",
            hint="80 is the default; an H100 has 80, an H200 141",
        )
    values: dict[str, Any] = {
        "hbm_bytes": None if hbm_gib is None else max(1, int(hbm_gib * GIB)),
        "intra_gbps": intra_gbps,
        "inter_gbps": inter_gbps,
    }
    given = {name: value for name, value in values.items() if value is not None}
    if gpu is not None:
        preset = find_gpu(gpu)
        given = {name: getattr(preset, name) for name in values} | given
    return Cluster(hosts=hosts, ranks_per_host=ranks_per_host, **given)
