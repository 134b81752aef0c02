"""The cost model on an emulated cluster: all ranks share a few cores, links are slow.

Counts of bytes and messages are those of `dmt_convert.plan`. A step is a sum of

    A * ranks / cores                what a rank computes (A: CPU seconds per rank)
    alpha * messages / cores         CPU seconds per message, of all ranks
    beta * bytes / cores             CPU seconds per byte copied, of all ranks
    link bytes / rate / efficiency   embeddings, their gradients, ids
    dense bytes / rate / efficiency  the ring that sums dense gradients; P parameters, unknown

with five constants, none negative, that minimise the squared relative error of measured steps.
CPU time and link time add up: nothing is known to hide here, since every rank waits for a core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emulated_runs import Run

from dmt_convert.plan import Assumptions, Cluster, Network
from dmt_convert.plan.collectives import Peers
from dmt_convert.plan.step_load import StepLoad, as_flat, even_load
from dmt_convert.plan.suggestion import deal_tables
from dmt_convert.plan.traffic import ELEMENT_BYTES, Exchange
from dmt_convert.spec import FeatureSpec, InteractionSpec, MlpSpec, ModelSpec, TableSpec
from dmt_convert.towers import DmtSpec, TowerModuleSpec, TowerSpec

Floats = npt.NDArray[np.float64]
CORES = 2
TERMS = ("A", "alpha", "beta", "1 / efficiency", "P / efficiency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a step moves."""

    link_bytes: float
    """Embeddings, gradients and ids over one host's link, in one direction."""
    all_bytes: float
    """The same with what stays inside hosts, sent by all ranks."""
    messages: float
    """Sent by all ranks."""


def count(run: Run) -> Counts:
    """Count what a run moves, by the library's formulas."""
    cluster = Cluster(hosts=run.hosts, ranks_per_host=run.ranks)
    load = _load(run, cluster)
    network = Network(cluster=cluster, assumptions=Assumptions())
    inside = Peers.of_hosts(network.cluster, load.group_hosts)
    between = Peers.between_groups(load.groups)
    traffic = load.traffic
    scale = run.element_bytes / ELEMENT_BYTES
    exchanges: list[tuple[Exchange, Peers, float]] = [
        (traffic.peer_indices, between, 1.0),
        (traffic.tower_indices, inside, 1.0),
        (traffic.tower_embeddings, inside, 2 * scale),
        (traffic.tower_outputs, between, 2 * scale),
    ]
    world = cluster.world_size
    cross = sum(times * exchange.cross_bytes for exchange, _, times in exchanges)
    intra = sum(times * exchange.intra_bytes for exchange, _, times in exchanges)
    trips = (1, 1, 2, 2)  # ids go one way
    sent = sum(
        trip * (peers.cross + peers.intra)
        for trip, (_, peers, _) in zip(trips, exchanges, strict=True)
    )
    return Counts(
        link_bytes=cross * run.batch * run.ranks,
        all_bytes=(cross + intra) * run.batch * world,
        messages=world * (sent + 2 * (world - 1)),
    )


def ring_share(run: Run) -> float:
    """Bytes over a host's link, in one direction, per byte that a ring of all ranks sums."""
    world = run.hosts * run.ranks
    return 2 * (world - 1) / world if run.hosts > 1 else 0.0


def terms(run: Run) -> Floats:
    """What every constant is multiplied with to give seconds, in the order of `TERMS`."""
    found = count(run)
    rate = run.link_mbit * 1e6 / 8
    world = run.hosts * run.ranks
    return np.array(
        [
            world / CORES,
            found.messages / CORES,
            found.all_bytes / CORES,
            found.link_bytes / rate,
            ring_share(run) * ELEMENT_BYTES / rate,
        ]
    )


def fit(runs: Sequence[Run]) -> Floats:
    """Return the constants, none negative, with the least squared relative error.

    With five of them every set of those that are not 0 can be tried.
    """
    rows = np.array([terms(run) / (run.step_ms / 1e3) for run in runs])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    rows = rows / scale
    target = np.ones(len(runs))
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
    return float(terms(run) @ constants) * 1e3


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
