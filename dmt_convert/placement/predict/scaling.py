"""How flat, SPTT and DMT steps grow with the cluster, by the cost model.

Letters: T towers, H hosts, R ranks per host. The batch per rank stays the same (weak scaling).
Everything is spread perfectly evenly here, in all three variants, and memory is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from dmt_convert.errors import ConfigError
from dmt_convert.placement.predict.cost_model import Machine
from dmt_convert.placement.predict.prediction import (
    MAX_RANKS,
    Prediction,
    check_ids_per_bag,
    compare,
)
from dmt_convert.placement.predict.step_load import as_flat, as_passthrough, even_load
from dmt_convert.placement.predict.suggestion import dealt_model
from dmt_convert.spec import ModelSpec

MIN_RANKS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """One size of cluster."""

    hosts: int
    """H."""
    ranks: int
    """H * R."""
    towers: int
    """T: as many as hosts, or where the tables are too few for that, as many as divide them."""
    compression: float
    """Of the towers."""
    prediction: Prediction
    """The three step times."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        flat, sptt, dmt = (predicted.step for predicted in self.prediction.steps)
        return {
            "ranks": self.ranks,
            "hosts": self.hosts,
            "towers": self.towers,
            "compression": self.compression,
            "flat_ms": flat.total * 1e3,
            "sptt_ms": sptt.total * 1e3,
            "dmt_ms": dmt.total * 1e3,
            "flat_exposed_ms": flat.exposed * 1e3,
            "sptt_exposed_ms": sptt.exposed * 1e3,
            "dmt_exposed_ms": dmt.exposed * 1e3,
            "sptt_speedup": self.prediction.sptt.speedup,
            "dmt_speedup": self.prediction.dmt.speedup,
        }


def predict_scaling(
    flat: ModelSpec, machine: Machine, *, compression: float, ids_per_bag: float = 1.0
) -> tuple[ScalePoint, ...]:
    """Predict clusters of 16 to 16,384 ranks, with the machine's ranks per host and links.

    Args:
        flat: The flat model.
        machine: What it runs on; its number of hosts does not matter.
        compression: Of the towers; 1 for none.
        ids_per_bag: Mean number of ids per sample and feature.

    Raises:
        ConfigError: No such cluster has so many ranks per host, or the number of ids is none.
    """
    check_ids_per_bag(ids_per_bag)
    ranks_per_host = machine.network.cluster.ranks_per_host
    if ranks_per_host > MAX_RANKS:
        raise ConfigError(
            f"{ranks_per_host} ranks per host to predict",
            expected=f"at most {MAX_RANKS} ranks in all",
            hint="lower --ranks-per-host",
        )
    return tuple(
        _point(flat, hosts, machine, compression, ids_per_bag)
        for hosts in _host_counts(ranks_per_host)
    )


def _host_counts(ranks_per_host: int) -> Iterator[int]:
    hosts = 1
    while hosts * ranks_per_host <= MAX_RANKS:
        if hosts * ranks_per_host >= MIN_RANKS:
            yield hosts
        hosts *= 2


def _point(
    flat: ModelSpec, hosts: int, machine: Machine, compression: float, ids_per_bag: float
) -> ScalePoint:
    cluster = replace(machine.network.cluster, hosts=hosts)
    there = replace(machine, network=replace(machine.network, cluster=cluster))
    most = min(hosts, len(flat.tables))
    towers = next(count for count in range(most, 0, -1) if hosts % count == 0)
    model = dealt_model(flat, towers, compression)
    if model is None:
        raise ConfigError(
            f"a compression of {compression:g}",
            expected="at most the embedding dim",
            hint="convert with less",
        )
    prediction = compare(
        even_load(as_flat(flat), cluster, ids_per_bag),
        even_load(as_passthrough(model), cluster, ids_per_bag),
        even_load(model, cluster, ids_per_bag),
        there,
    )
    return ScalePoint(
        hosts=hosts,
        ranks=cluster.world_size,
        towers=towers,
        compression=model.compression,
        prediction=prediction,
    )
