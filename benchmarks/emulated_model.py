"""The cost model on an emulated cluster: all ranks share a few cores, links are slow.

Counts of bytes and messages are those of `dmt_convert.placement`. A step is the sum of

    A * ranks / cores                what a rank computes (A: CPU seconds per rank)
    alpha * messages / cores         CPU seconds per message, of all ranks
    beta * crossing bytes / cores    CPU seconds per byte that leaves a host: both ends, the bridge
                                     and the shaping of links run on the same cores
    link bytes / rate / efficiency   embeddings, their gradients, ids
    dense bytes / rate / efficiency  the ring that sums gradients of P dense parameters, unknown

with five constants, none negative, that minimise the squared relative error of measured steps.
CPU time and link time add up: what might hide is left to the constants, since every rank waits for
a core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emulated_runs import Run

from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec
from dmt_convert.placement import Cluster
from dmt_convert.placement.predict.cost_model import StepLoad, as_flat, even_load
from dmt_convert.placement.predict.machine import Peers
from dmt_convert.placement.predict.prediction import deal_tables
from dmt_convert.placement.traffic import ELEMENT_BYTES
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec

Floats = npt.NDArray[np.float64]
TERMS = ("A", "alpha", "beta", "1 / efficiency", "P / efficiency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a step moves."""

    link_bytes: float
    """Embeddings, gradients and ids over one host's link, in one direction."""
    crossing_bytes: float
    """The same over all links."""
    messages: float
    """Sent by all ranks."""


def count(run: Run) -> Counts:
    """Count what a run moves, by the library's formulas."""
    cluster = Cluster(hosts=run.hosts, ranks_per_host=run.ranks)
    load = _load(run, cluster)
    inside = Peers.of_hosts(cluster, load.group_hosts)
    between = Peers.between_groups(load.groups)
    traffic = load.traffic
    everybody = Peers.of_all(cluster)
    # our engine sends ids in one hop, TorchRec's towers in two
    hops = [everybody] if run.kind in ("sptt", "dmt") else [between, inside]
    indices = traffic.peer_indices.cross_bytes + traffic.tower_indices.cross_bytes
    vectors = traffic.tower_embeddings.cross_bytes + traffic.tower_outputs.cross_bytes
    per_sample = indices + 2 * run.element_bytes / ELEMENT_BYTES * vectors
    world = cluster.world_size
    sent = sum(peers.cross + peers.intra for peers in [*hops, inside, inside, between, between])
    link_bytes = per_sample * run.batch * run.ranks
    return Counts(
        link_bytes=link_bytes,
        crossing_bytes=link_bytes * run.hosts,
        messages=world * (sent + 2 * (world - 1)),
    )


def ring_share(run: Run) -> float:
    """Bytes over a host's link, in one direction, per byte that a ring of all ranks sums."""
    world = run.hosts * run.ranks
    return 2 * (world - 1) / world if run.hosts > 1 else 0.0


def terms(run: Run) -> Floats:
    """What every constant is multiplied with to give seconds, in the order of `TERMS`."""
    found = count(run)
    rate = run.rate_mbit * 1e6 / 8
    world = run.hosts * run.ranks
    return np.array(
        [
            world / run.cores,
            found.messages / run.cores,
            found.crossing_bytes / run.cores,
            found.link_bytes / rate,
            ring_share(run) * ELEMENT_BYTES / rate,
        ]
    )


def determines(runs: Sequence[Run]) -> bool:
    """Whether the runs differ enough to tell all constants apart."""
    rows = np.array([terms(run) / run.step_ms for run in runs])
    rows = rows / np.maximum(rows.max(axis=0), 1e-300)
    return int(np.linalg.matrix_rank(rows, tol=1e-6 * len(runs))) == rows.shape[1]


def fit(runs: Sequence[Run]) -> Floats:
    """Return the constants, none negative, with the least squared relative error.

    With five of them every set of those that are not 0 can be tried.
    """
    rows = np.array([terms(run) / (run.step_ms / 1e3) for run in runs])
    target = np.array([1 - run.compute_ms / run.step_ms for run in runs])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    rows = rows / scale
    best, least = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), size):
            part = rows[:, chosen]
            found, *_ = np.linalg.lstsq(part, target, rcond=None)
            error = float(np.square(part @ found - target).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best = np.zeros(rows.shape[1])
                best[list(chosen)] = found
                least = error
    return best / scale


def predict_ms(run: Run, constants: Floats) -> float:
    """Predict a step."""
    return run.compute_ms + float(terms(run) @ constants) * 1e3


def _load(run: Run, cluster: Cluster) -> StepLoad:
    """A model of so many features on so many towers as hosts; its dense parts do not matter."""
    width = (run.features + 1) * run.dim
    names = [f"f{i}" for i in range(run.features)]
    flat = ModelSpec(
        family="benchmark",
        tables=tuple(TableSpec(name=name, rows=1, dim=run.dim) for name in names),
        features=tuple(FeatureSpec(name=name, table=name) for name in names),
        dense_arch=MlpSpec(widths=(1, run.dim), final_relu=True),
        interaction=InteractionSpec(kind="cat"),
        over_arch=MlpSpec(widths=(width, 1), final_relu=False),
    )
    if run.kind == "flat":
        return even_load(as_flat(flat), cluster, run.pooling)
    bare = TowerModuleSpec(kind="passthrough")
    narrow = TowerModuleSpec(kind="dlrm", c=1, dim=max(1, round(run.dim / run.compression)))
    towers = deal_tables(flat, min(run.hosts, run.features)).towers
    module = bare if run.compression == 1 else narrow
    model = DmtSpec(
        flat=flat, towers=tuple(TowerSpec(features=part, module=module) for part in towers)
    )
    return even_load(model, cluster, run.pooling)
