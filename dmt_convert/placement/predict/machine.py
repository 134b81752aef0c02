"""What a step runs on: accelerators, the links between them, and what these reach of their peaks.

Sources of all numbers: docs/prediction.md. How long collectives take, with H hosts, R ranks per
host, and n ranks that take part:

    AlltoAll:   launch + max(cross, intra)
                cross = message * peers on other hosts + bytes / (rate * efficiency(n))
                efficiency(n) = efficiency * 1 / (1 + scale_loss * log2 n)
    all-reduce: launch + 2 hops per doubling of ranks and hosts + max(cross, intra)
                cross = 2 P (H - 1) / (H R) per network card, intra = 2 P (R - 1) / R

Both kinds of link work at once, and both directions of each.

Letter: B samples per rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from dmt_convert.documents import to_json
from dmt_convert.errors import ConfigError
from dmt_convert.model import element_bytes
from dmt_convert.placement import ELEMENT_BYTES, GIB, Cluster, Exchange
from dmt_convert.spec import COMM_DTYPES, CommDtype, MatmulPrecision

_BITS = 8e-9
"""Gigabit per byte."""
_US = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator, and the links that it usually has."""

    name: str
    """What `--gpu` calls it."""
    peaks: Mapping[MatmulPrecision, float] = field(hash=False)
    """Peak of dense float32 matrix products by the precision that torch gives them, in FLOP/s and
    without sparsity. Hardware without TF32 or bf16 computes them in float32."""
    matmul_precision: MatmulPrecision = "high"
    """The one that training uses: TF32, unless it is told otherwise."""
    hbm_bytes: int
    """Memory, in bytes."""
    hbm_bytes_per_s: float
    """Peak memory bandwidth, in bytes/s."""
    intra_gbps: float
    """Peak to the other ranks of its host, one direction, in gigabit/s."""
    inter_gbps: float
    """Its share of the host's network cards, one direction, in gigabit/s."""
    domain_ranks: int = 8
    """GPUs that NVLink joins: those of a host, or of a pod of several hosts."""

    @property
    def flops_per_s(self) -> float:
        """Peak of matrix products in the precision that training uses, in FLOP/s."""
        return self.peaks[self.matmul_precision]


def _peaks(fp32: float, tf32: float, bf16: float) -> dict[MatmulPrecision, float]:
    return {"highest": fp32, "high": tf32, "medium": bf16}


_GB: Final = 10**9
GPUS: Final[tuple[Gpu, ...]] = (
    Gpu(
        name="v100",
        peaks=_peaks(15.7e12, 15.7e12, 15.7e12),
        hbm_bytes=32 * GIB,
        hbm_bytes_per_s=900e9,
        intra_gbps=1200.0,
        inter_gbps=50.0,
    ),
    Gpu(
        name="a100",
        peaks=_peaks(19.5e12, 156e12, 312e12),
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=2039e9,
        intra_gbps=2400.0,
        inter_gbps=200.0,
    ),
    Gpu(
        name="h100",
        peaks=_peaks(66.9e12, 494.7e12, 989.4e12),
        hbm_bytes=80 * GIB,
        hbm_bytes_per_s=3350e9,
        intra_gbps=3600.0,
        inter_gbps=400.0,
    ),
    Gpu(
        name="h200",
        peaks=_peaks(66.9e12, 494.7e12, 989.4e12),
        hbm_bytes=141 * _GB,
        hbm_bytes_per_s=4800e9,
        intra_gbps=3600.0,
        inter_gbps=400.0,
    ),
    Gpu(
        name="b200",
        peaks=_peaks(75e12, 1100e12, 2250e12),
        hbm_bytes=180 * _GB,
        hbm_bytes_per_s=8000e9,
        intra_gbps=7200.0,
        inter_gbps=400.0,
    ),
    Gpu(
        name="gb200",
        peaks=_peaks(80e12, 1250e12, 2500e12),
        hbm_bytes=186 * _GB,
        hbm_bytes_per_s=8000e9,
        intra_gbps=7200.0,
        inter_gbps=400.0,
        domain_ranks=72,
    ),
    Gpu(
        name="gb300",
        peaks=_peaks(80e12, 1250e12, 2500e12),
        hbm_bytes=278 * _GB,
        hbm_bytes_per_s=8000e9,
        intra_gbps=7200.0,
        inter_gbps=800.0,
        domain_ranks=72,
    ),
)
"""GB200 and GB300 as NVL72: hosts of four GPUs, pods of 18 hosts."""


def find_gpu(name: str) -> Gpu:
    """Return the preset of that name, in whatever case.

    Raises:
        ConfigError: There is no such preset.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise ConfigError(
        f"--gpu {name}",
        expected="one of " + ", ".join(gpu.name for gpu in GPUS),
        hint="take the nearest one and override its numbers, such as --inter-gbps and --assume",
    )


_SHARES = (
    "compute_efficiency",
    "lookup_efficiency",
    "copy_efficiency",
    "cross_efficiency",
    "intra_efficiency",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Shares of the peaks that a step reaches, and costs that do not depend on its size."""

    compute_efficiency: float = 0.4
    """Share of the peak FLOP/s that MLPs, interaction and tower modules reach."""
    lookup_efficiency: float = 0.5
    """Share of the peak memory bandwidth that lookups and updates of random rows reach."""
    copy_efficiency: float = 0.85
    """Share of the peak memory bandwidth that copies of whole vectors reach."""
    cross_efficiency: float = 0.97
    """Share of its network rate that a rank reaches with large messages."""
    intra_efficiency: float = 0.82
    """Share of its rate inside the host that a rank reaches with large messages."""
    scale_loss: float = 0.03
    """What every doubling of the ranks in one AlltoAll between hosts adds to the time per byte, as
    a share of the time per byte between two ranks."""
    launch_us: float = 8.4
    """Time of a collective that carries nothing, in microseconds."""
    cross_message_us: float = 2.7
    """What each peer on another host adds to an AlltoAll, in microseconds."""
    intra_message_us: float = 0.6
    """What each peer on the same host adds to an AlltoAll, in microseconds."""
    cross_hop_us: float = 14.0
    """One step of an all-reduce between hosts, in microseconds."""
    intra_hop_us: float = 3.4
    """One step of an all-reduce inside a host, in microseconds."""
    step_overhead_us: float = 500.0
    """What every step pays whatever its size (kernel launches, input, optimizer), in
    microseconds."""
    prefetch: float = 1.0
    """Share of the index exchange that may run during the step before (0: none)."""
    sync_steps: float = 1.0
    """Flat in 2D: steps after which the copies of the tables are averaged; TorchRec's pipeline does
    it in every one."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value!r}"
            for name, value in asdict(self).items()
            if not math.isfinite(value)
            or value < 0
            or (name in _SHARES and not 0 < value <= 1)
            or (name == "prefetch" and value > 1)
            or (name == "sync_steps" and value < 1)
        ]
        if wrong:
            raise ConfigError(
                "invalid constants: " + ", ".join(wrong),
                expected="efficiencies above 0 and at most 1, prefetch between 0 and 1, sync_steps "
                "at least 1, all else 0 or more",
                hint="check --assume",
            )

    def override(self, settings: Sequence[str]) -> Assumptions:
        """Return these constants with some replaced.

        Args:
            settings: NAME=VALUE each.

        Raises:
            ConfigError: A setting is not of that form, or names no constant.
        """
        names = [field.name for field in fields(self)]
        values: dict[str, Any] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            value = _number(text)
            if not equals or name not in names or value is None:
                raise ConfigError(
                    f"--assume {setting}",
                    expected="NAME=NUMBER with one of the names " + ", ".join(names),
                    hint="an example: --assume compute_efficiency=0.3",
                )
            values[name] = value
        return replace(self, **values)

    def to_json(self) -> dict[str, float]:
        """Return name and value of every constant."""
        return to_json(self)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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
        """All other ranks of that number of hosts."""
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
        """Time for bytes between hosts in a collective of `ranks` ranks, without latency."""
        known = self.assumptions
        loss = 1 + known.scale_loss * math.log2(max(ranks, 1))
        return num_bytes * _BITS * loss / (self.cluster.inter_gbps * known.cross_efficiency)

    def intra_seconds(self, num_bytes: float) -> float:
        """Time for bytes inside a host, without latency."""
        return num_bytes * _BITS / (self.cluster.intra_gbps * self.assumptions.intra_efficiency)

    def all_to_all(self, exchange: Exchange, samples: int, peers: Peers) -> float:
        """Time of one AlltoAll, in seconds; 0 if there is nobody to exchange with.

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

    def average_copies(self, num_bytes: float, copies: int) -> float:
        """Time to average bytes of a rank with those at its place in other groups, in seconds."""
        known = self.assumptions
        hops = known.cross_hop_us * math.log2(copies)
        cross = self.cross_seconds(2 * num_bytes * (copies - 1) / copies, copies)
        return (known.launch_us + 2 * hops) * _US + cross

    def all_reduce(self, num_bytes: float, hosts: int) -> float:
        """Time to sum bytes over all ranks of `hosts` hosts, in seconds."""
        ranks = self.cluster.ranks_per_host
        if hosts * ranks == 1 or num_bytes == 0:
            return 0.0
        known = self.assumptions
        hops = known.cross_hop_us * math.log2(hosts) + known.intra_hop_us * math.log2(ranks)
        cross = self.cross_seconds(2 * num_bytes * (hosts - 1) / (hosts * ranks), hosts)
        intra = self.intra_seconds(2 * num_bytes * (ranks - 1) / ranks)
        return (known.launch_us + 2 * hops) * _US + max(cross, intra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What steps run on, and how."""

    gpu: Gpu
    """The accelerator of every rank; its links and memory are the network's cluster's."""
    network: Network
    """The links."""
    batch: int
    """B."""
    comm_dtype: CommDtype | None = None
    """What embeddings, tower outputs without a code, and gradients travel as; ids stay int64,
    gradients of dense parts float32. None: fp32, and gradients of coded towers as their code."""

    def __post_init__(self) -> None:
        if type(self.batch) is not int or self.batch < 1:
            raise ConfigError(
                f"--batch {self.batch}",
                expected="samples per rank and step, at least 1",
                hint="1024 is the default",
            )
        if self.comm_dtype not in (None, *COMM_DTYPES):
            raise ConfigError(
                f"--comm-dtype {self.comm_dtype}",
                expected="one of " + ", ".join(COMM_DTYPES),
                hint="fp32 is the default; bf16 halves what crosses hosts",
            )

    @property
    def embedding_dtype(self) -> CommDtype:
        """What embeddings travel as."""
        return self.comm_dtype or "fp32"

    @property
    def title(self) -> str:
        """Describe the machine in one line, for figures."""
        cluster = self.network.cluster
        return (
            f"{self.gpu.name.upper()}, {cluster.ranks_per_host} per host, "
            f"{cluster.inter_gbps:g} Gbit/s each, {self.batch} samples per GPU, "
            f"{self.embedding_dtype} communication"
        )

    def compute_seconds(self, flops: float) -> float:
        """Time for a number of FLOPs."""
        return flops / (self.gpu.flops_per_s * self.network.assumptions.compute_efficiency)

    def memory_seconds(self, num_bytes: float) -> float:
        """Time to read or write bytes in random rows."""
        share = self.network.assumptions.lookup_efficiency
        return num_bytes / (self.gpu.hbm_bytes_per_s * share)

    def copy_seconds(self, num_bytes: float) -> float:
        """Time to read or write bytes in whole vectors."""
        return num_bytes / (self.gpu.hbm_bytes_per_s * self.network.assumptions.copy_efficiency)

    def in_transit(self, embeddings: Exchange) -> Exchange:
        """Return an exchange of the flat model's embeddings, counted as float32, as it travels.

        Those of towers stay float32: the engine's precision is of what tower modules emit.
        """
        scale = element_bytes(self.embedding_dtype) / ELEMENT_BYTES
        return Exchange(
            cross_bytes=embeddings.cross_bytes * scale, intra_bytes=embeddings.intra_bytes * scale
        )
