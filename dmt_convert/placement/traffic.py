"""What the exchanges of one training step carry, and how long the links need for it.

Letters: B samples per rank and step, H hosts, R ranks per host, T towers, P groups of k
consecutive hosts that hold towers together (P = H, k = 1 unless T < H), L = k * R.

A rank that sees B samples of its own looks up its tower's tables for P * B samples: its own and
those of its peers, the ranks at the same place in the other groups. All numbers are bytes per
sample of a rank's own batch, in one direction, of the busiest rank, the greater of what it
sends and what it receives. Only bandwidth is modelled: no latency, no congestion, nothing that
overlaps with computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from dmt_convert.documents import OMITTED_IF_EMPTY, OMITTED_IF_NONE
from dmt_convert.placement.cluster import Amount, Cluster

ELEMENT_BYTES: Final = 4
"""Pooled embeddings travel as float32, inside hosts and in the flat model."""
ID_BYTES: Final = 8
"""Ids travel as int64 (the lengths of the bags are left out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One AlltoAll."""

    cross_bytes: Amount
    """To or from other hosts, in bytes per sample."""
    intra_bytes: Amount
    """To or from other ranks of the same host, in bytes per sample."""

    def seconds(self, cluster: Cluster, samples: int) -> float:
        """Time for `samples` per rank; both kinds of link work at once."""
        bits = 8e-9 * samples
        return bits * max(
            self.cross_bytes / cluster.inter_gbps, self.intra_bytes / cluster.intra_gbps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicationEstimate:
    """Predicted time of all exchanges of one step, forward and backward."""

    samples_per_rank: int
    """B."""
    flat_seconds: float
    """Flat hybrid parallelism: indices, embeddings, gradients over all ranks."""
    dmt_seconds: float
    """Towers: indices to the peers and inside the host, embeddings inside the host, tower
    outputs to the peers, and the gradients of both; gradients of tables on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The exchanges of the flat model and of the towers."""

    flat_cross_bytes: Amount
    """Pooled embeddings that a host takes in from others, per sample of its own, flat: the mean
    over hosts (the gradients go back in the same number)."""
    dmt_cross_bytes: Amount
    """The same for the towers: tower outputs, and for towers over several hosts the embeddings
    that move between those. (One byte more per message of levels says whether all are finite.)"""
    flat_indices: Exchange
    """Flat: ids to the ranks of their tables."""
    flat_embeddings: Exchange
    """Flat: pooled embeddings to the ranks of their samples."""
    peer_indices: Exchange
    """Towers: ids to the peer in the tower's group of hosts."""
    tower_indices: Exchange
    """Towers: ids to the ranks of their tables, inside the group."""
    tower_embeddings: Exchange
    """Towers: pooled embeddings inside the group."""
    tower_outputs: Exchange
    """Towers: outputs of the tower modules to the peers, in the bytes of their codes."""
    tower_gradients: Exchange | None = field(default=None, metadata=OMITTED_IF_NONE)
    """Towers: the gradients of these, back; None: as many bytes."""
    dmt_gradient_bytes: Amount | None = field(default=None, metadata=OMITTED_IF_NONE)
    """As `dmt_cross_bytes`, of the gradients; None: as many bytes."""
    replicated_step_bytes: Amount = field(default=0.0, metadata=OMITTED_IF_EMPTY)
    """Towers: gradients of the tables on every rank, summed in a ring: what a host sends, and
    receives, in one step, however many samples it has."""

    @property
    def output_gradients(self) -> Exchange:
        """Towers: the gradients of their outputs."""
        return self.tower_gradients or self.tower_outputs

    @property
    def gradient_cross_bytes(self) -> float:
        """As `dmt_cross_bytes`, of the gradients."""
        found = self.dmt_gradient_bytes
        return self.dmt_cross_bytes if found is None else found

    @property
    def compression(self) -> float:
        """How many times fewer embedding bytes cross hosts than in the flat model."""
        return self.flat_cross_bytes / self.dmt_cross_bytes if self.dmt_cross_bytes else 1.0

    def estimate(self, cluster: Cluster, samples_per_rank: int) -> CommunicationEstimate:
        """Predict the time that the links need for one step.

        Args:
            cluster: Where the model runs.
            samples_per_rank: B.
        """

        def total(*exchanges: Exchange) -> float:
            return math.fsum(e.seconds(cluster, samples_per_rank) for e in exchanges)

        summed = Exchange(
            cross_bytes=self.replicated_step_bytes / cluster.ranks_per_host, intra_bytes=0.0
        )

        return CommunicationEstimate(
            samples_per_rank=samples_per_rank,
            # embeddings go forward and their gradients back; ids go once
            flat_seconds=total(self.flat_indices, self.flat_embeddings, self.flat_embeddings),
            dmt_seconds=total(
                *(self.peer_indices, self.tower_indices),
                *(self.tower_embeddings, self.tower_outputs),
                *(self.tower_embeddings, self.output_gradients),
            )
            + summed.seconds(cluster, 1),
        )


def measure_traffic(
    cluster: Cluster,
    *,
    group_hosts: int,
    group_bytes: Sequence[int],
    gradient_bytes: Sequence[int],
    rank_widths: Sequence[float],
    rank_ids: Sequence[float],
    flat_width: int,
    ids: Sequence[float],
    replicated_elements: int = 0,
    replicated_ids: float = 0.0,
) -> Traffic:
    """Count what every exchange carries.

    Args:
        cluster: Where the model runs.
        group_hosts: k.
        group_bytes: Bytes that the towers of each of the P groups send per sample.
        gradient_bytes: Bytes of the gradients that come back to each of them.
        rank_widths: Elements that each of the W ranks looks up and pools per sample; a
            row-wise shard counts with its full width, for it yields partial sums.
        rank_ids: Ids that each rank looks up per sample.
        flat_width: Elements of all pooled embeddings of a sample.
        ids: Ids per sample of the features of each of the P groups.
        replicated_elements: Elements of all tables that every rank holds.
        replicated_ids: Ids per sample that are looked up in these, and stay where they are.
    """
    groups = len(group_bytes)
    hosts, ranks_per_host = cluster.hosts, cluster.ranks_per_host
    group_ranks = group_hosts * ranks_per_host
    embeddings = _inside_groups(rank_widths, group_ranks, ranks_per_host)
    indices = _inside_groups(rank_ids, group_ranks, ranks_per_host)
    # Of a mean rank: what the other ranks of its group, on other hosts, hold for it.
    mean_inside = sum(rank_widths) * (group_ranks - ranks_per_host) / cluster.world_size * groups

    def flat(per_sample: float) -> Exchange:
        return Exchange(
            cross_bytes=per_sample * (hosts - 1) / hosts,
            intra_bytes=per_sample * (ranks_per_host - 1) / cluster.world_size,
        )

    def scaled(per_rank: tuple[float, float], element_bytes: int) -> Exchange:
        cross, intra = (float(value * groups * element_bytes) for value in per_rank)
        return Exchange(cross_bytes=cross, intra_bytes=intra)

    alike = list(group_bytes) == list(gradient_bytes)

    def entering(per_group: Sequence[int]) -> float:
        """Bytes that enter a host."""
        return sum(per_group) * (groups - 1) / groups + ELEMENT_BYTES * mean_inside

    return Traffic(
        flat_cross_bytes=ELEMENT_BYTES * flat_width * (hosts - 1) / hosts,
        dmt_cross_bytes=entering(group_bytes),
        flat_indices=flat((math.fsum(ids) + replicated_ids) * ID_BYTES),
        flat_embeddings=flat(float(flat_width * ELEMENT_BYTES)),
        peer_indices=_between_groups([ID_BYTES * count for count in ids]),
        tower_indices=scaled(indices, ID_BYTES),
        tower_embeddings=scaled(embeddings, ELEMENT_BYTES),
        tower_outputs=_between_groups(group_bytes),
        tower_gradients=None if alike else _between_groups(gradient_bytes),
        dmt_gradient_bytes=None if alike else entering(gradient_bytes),
        replicated_step_bytes=ring_bytes(cluster, replicated_elements),
    )


def ring_bytes(cluster: Cluster, elements: int) -> float:
    """Bytes that a host sends while all ranks sum float32 elements in a ring."""
    if cluster.hosts == 1:
        return 0.0
    return 2 * ELEMENT_BYTES * elements * (cluster.world_size - 1) / cluster.world_size


def _inside_groups(
    per_rank: Sequence[float], group_ranks: int, ranks_per_host: int
) -> tuple[float, float]:
    """Return the (cross-host, intra-host) load of the busiest rank, per looked-up sample.

    The samples of a group are spread evenly over its ranks, so each rank sends what it holds
    to every other one, and receives what every other one holds.
    """
    cross = intra = 0.0
    for first in range(0, len(per_rank), group_ranks):
        in_group = math.fsum(per_rank[first : first + group_ranks])
        for host in range(first, first + group_ranks, ranks_per_host):
            on_host = math.fsum(per_rank[host : host + ranks_per_host])
            for own in per_rank[host : host + ranks_per_host]:
                cross = max(cross, own * (group_ranks - ranks_per_host), in_group - on_host)
                intra = max(intra, own * (ranks_per_host - 1), on_host - own)
    return cross, intra


def _between_groups(per_group: Sequence[float]) -> Exchange:
    """Return the exchange among peers, of the bytes of every group.

    A rank moves its group's part P - 1 times one way, and each other part once the other way.
    """
    total = math.fsum(per_group)
    busiest = max(max(own * (len(per_group) - 1), total - own) for own in per_group)
    return Exchange(cross_bytes=float(max(busiest, 0.0)), intra_bytes=0.0)
