"""How long collectives take: latency that grows with the peers, and bytes over bandwidth.

Letters: H hosts, R ranks per host, n ranks that take part.

    AlltoAll:   launch + max(cross, intra)
                cross = message * peers on other hosts + bytes / (rate * efficiency(n))
                efficiency(n) = efficiency * 1 / (1 + scale_loss * log2 n)
    all-reduce: launch + 2 hops per doubling of ranks and hosts + max(cross, intra)
                cross = 2 P (H - 1) / (H R) per network card, intra = 2 P (R - 1) / R

Both kinds of link work at once, and both directions of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmt_convert.placement import Cluster, Exchange
from dmt_convert.placement.predict.assumptions import Assumptions

_BITS = 8e-9
"""Gigabit per byte."""
_US = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """With whom a rank exchanges in one AlltoAll, itself left out."""

    cross: int
    """Ranks on other hosts."""
    intra: int
    """Ranks on its own host."""

    @classmethod
    def of_all(cls, cluster: Cluster) -> Peers:
        """All other ranks."""
        return cls.of_hosts(cluster, cluster.hosts)

    @classmethod
    def of_hosts(cls, cluster: Cluster, hosts: int) -> Peers:
        """All other ranks of so many hosts."""
        return cls(
            cross=(hosts - 1) * cluster.ranks_per_host,
            intra=cluster.ranks_per_host - 1,
        )

    @classmethod
    def between_groups(cls, groups: int) -> Peers:
        """The ranks at the same place in the other groups of hosts."""
        return cls(cross=groups - 1, intra=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The links of a cluster, and what they reach."""

    cluster: Cluster
    """The machines and their rates."""
    assumptions: Assumptions
    """Latencies and efficiencies."""

    def cross_seconds(self, num_bytes: float, ranks: int) -> float:
        """Time for bytes between hosts in a collective of so many ranks, without latency."""
        known = self.assumptions
        loss = 1 + known.scale_loss * math.log2(max(ranks, 1))
        return num_bytes * _BITS * loss / (self.cluster.inter_gbps * known.cross_efficiency)

    def intra_seconds(self, num_bytes: float) -> float:
        """Time for bytes inside a host, without latency."""
        return num_bytes * _BITS / (self.cluster.intra_gbps * self.assumptions.intra_efficiency)

    def all_to_all(self, exchange: Exchange, samples: int, peers: Peers) -> float:
        """Time of one AlltoAll, in seconds; 0 where there is nobody to exchange with.

        Args:
            exchange: What the busiest rank moves per sample.
            samples: Per rank.
            peers: With whom.
        """
        if peers.cross + peers.intra == 0:
            return 0.0
        known = self.assumptions
        cross = known.cross_message_us * _US * peers.cross + self.cross_seconds(
            exchange.cross_bytes * samples, peers.cross + peers.intra + 1
        )
        intra = known.intra_message_us * _US * peers.intra + self.intra_seconds(
            exchange.intra_bytes * samples
        )
        return known.launch_us * _US + max(cross, intra)

    def all_reduce(self, num_bytes: float, hosts: int) -> float:
        """Time to sum so many bytes over all ranks of so many hosts, in seconds."""
        ranks = self.cluster.ranks_per_host
        if hosts * ranks == 1 or num_bytes == 0:
            return 0.0
        known = self.assumptions
        hops = known.cross_hop_us * math.log2(hosts) + known.intra_hop_us * math.log2(ranks)
        cross = self.cross_seconds(2 * num_bytes * (hosts - 1) / (hosts * ranks), hosts)
        intra = self.intra_seconds(2 * num_bytes * (ranks - 1) / ranks)
        return (known.launch_us + 2 * hops) * _US + max(cross, intra)
