"""What the cluster benchmark measures, and how often. No torch.

Letters: H hosts, R ranks per host, W = H * R world size, N embedding dim, D tower output dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from dmt_convert.errors import ConfigError

Family = Literal["flat", "torchrec-towers", "sptt", "dmt"]
Precision = Literal["fp32", "bf16"]

DEFAULT_VARIANTS: Final = (
    "flat,flat-bf16,"
    "torchrec-towers-c1,torchrec-towers-c2,torchrec-towers-c4,torchrec-towers-c8,"
    "sptt,sptt-bf16,dmt-c2,dmt-c4,dmt-c8,dmt-c2-bf16,dmt-c4-bf16,dmt-c8-bf16"
)
_VARIANT: Final = re.compile(
    r"(flat|torchrec-towers-c(\d+)|(?:sptt|dmt-c(\d+))(-prefetch)?)(-bf16)?"
)
_MAX_RANKS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantName:
    """What the name of a variant says."""

    family: Family
    """flat: TorchRec, table-wise; torchrec-towers: TorchRec's towers as they ship; sptt: our
    engine with passthrough towers; dmt: our engine with tower modules."""
    compression: int
    """Embedding bytes that cross hosts, over those that do after the tower modules; N / D."""
    precision: Precision
    """Of the exchanges (bf16 stands for 16 bits: TorchRec's codecs take fp16 on a CPU)."""
    prefetch: bool
    """Whether the ids of the next batch travel during this one's step (our engine only)."""

    @property
    def model(self) -> str:
        """The model that it trains: variants of one model start with the same loss."""
        return f"compression {self.compression}, {self.precision}"

    @property
    def baseline(self) -> str:
        """The flat variant that it is compared with: the one of its own precision."""
        return "flat" if self.precision == "fp32" else "flat-bf16"

    @property
    def torchrec_rival(self) -> str | None:
        """TorchRec's towers that send as many bytes; None for what is TorchRec's own."""
        if self.family not in ("sptt", "dmt"):
            return None
        suffix = "" if self.precision == "fp32" else "-bf16"
        return f"torchrec-towers-c{self.compression}{suffix}"


def parse_variant(text: str, *, dim: int) -> VariantName:
    """Read a variant's name.

    Args:
        text: Such as `flat-bf16`, `torchrec-towers-c4`, `sptt` or `dmt-c8-bf16`.
        dim: N, which the compression has to divide.

    Raises:
        ConfigError: There is no such variant.
    """
    match = _VARIANT.fullmatch(text)
    compression = int(match[2] or match[3] or 1) if match else 0
    if match is None or compression < 1 or dim % compression:
        raise ConfigError(
            f"--variants has {text!r}",
            expected="flat, torchrec-towers-cX, sptt or dmt-cX, the latter two with or without "
            f"-prefetch, then all with or without -bf16; X divides the embedding dim {dim}",
            hint=f"the default is {DEFAULT_VARIANTS}",
        )
    family: Any = re.split(r"-c\d|-prefetch", match[1])[0]
    return VariantName(
        family=family,
        compression=compression,
        precision="bf16" if match[5] else "fp32",
        prefetch=match[4] is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """H hosts of R ranks each."""

    hosts: int
    """H."""
    ranks_per_host: int
    """R."""

    @property
    def name(self) -> str:
        """As it is written on the command line, such as `4x2`."""
        return f"{self.hosts}x{self.ranks_per_host}"

    @property
    def world_size(self) -> int:
        """W."""
        return self.hosts * self.ranks_per_host


def parse_topology(text: str) -> Topology:
    """Read `HxR`.

    Raises:
        ConfigError: It is not that, or the cluster is too small or too large for one machine.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    hosts, ranks = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (hosts >= 2 and ranks >= 1 and hosts * ranks <= _MAX_RANKS):
        raise ConfigError(
            f"--topologies has {text!r}",
            expected=f"hosts x ranks per host, such as 4x2: at least 2 hosts, at most {_MAX_RANKS} "
            "ranks, each a process on this machine",
            hint="the default is 4x2,8x1,2x4,8x2",
        )
    return Topology(hosts=hosts, ranks_per_host=ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the benchmark."""

    topologies: tuple[Topology, ...]
    """Clusters to build, one after the other."""
    rates: tuple[float, ...]
    """Link rates, Mbit/s, of every host's link in either direction."""
    variants: tuple[str, ...]
    """What is compared, interleaved."""
    rounds: int = 3
    """Turns at every rate; the order of the variants is drawn anew in each."""
    steps: int = 5
    """Measured steps of every variant in every turn."""
    warmup: int = 1
    """Steps before those, not measured."""
    batch: int = 256
    """Samples per rank and step."""
    pooling: int = 1
    """Ids per bag."""
    compute_ms: float = 0.0
    """Sleep in every step that stands for an accelerator's compute (modelled, not measured)."""
    features: int = 26
    """Features, each with a table of its own."""
    rows: int = 10_000
    """Rows per table."""
    dim: int = 128
    """Embedding dim N."""
    num_dense: int = 13
    """Dense inputs."""
    dense_layers: tuple[int, ...] = (32,)
    """Widths of dense_arch before its last layer, which is N wide."""
    over_layers: tuple[int, ...] = (32,)
    """Widths of over_arch before the logit."""
    learning_rate: float = 0.01
    """Of the fused row-wise Adagrad over the tables and of SGD over the rest."""
    seed: int = 0
    """Of weights, ids and the order of the variants."""
    timeout_s: float = 300.0
    """Longest that one turn of one variant may take before the run is given up."""

    def __post_init__(self) -> None:
        for name in self.variants:
            parse_variant(name, dim=self.dim)
        problems = [
            f"{name} is {getattr(self, name)}"
            for name in ("rounds", "steps", "warmup", "batch", "pooling", "features", "rows")
            if getattr(self, name) < 1
        ]
        problems += [f"rate {rate:g}" for rate in self.rates if not 1 <= rate <= 100_000]
        if not (math.isfinite(self.compute_ms) and self.compute_ms >= 0):
            problems.append(f"compute_ms is {self.compute_ms}")
        if self.timeout_s <= 0:
            problems.append(f"timeout_s is {self.timeout_s}")
        problems += [
            f"no {name}" for name in ("topologies", "rates", "variants") if not getattr(self, name)
        ]
        problems += [
            f"{name} lists one twice"
            for name in ("topologies", "rates", "variants")
            if len(set(getattr(self, name))) < len(getattr(self, name))
        ]
        wide = [t.name for t in self.topologies if t.world_size > self.features]
        problems += [f"{name} has more ranks than there are tables" for name in wide]
        if problems:
            raise ConfigError(
                "this cannot be measured: " + ", ".join(problems),
                expected="positive counts, rates between 1 and 100000 Mbit, nothing twice, a table "
                "for every rank",
                hint="leave the options at their defaults",
            )

    def for_topology(self, topology: Topology) -> Settings:
        """The part of the run that one cluster is launched for."""
        return replace(self, topologies=(topology,))

    @property
    def topology(self) -> Topology:
        """The only topology of `for_topology`."""
        (only,) = self.topologies
        return only

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Settings:
        """Read what `to_json` wrote."""
        parts: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in value.items()
        }
        topologies = tuple(Topology(**topology) for topology in value["topologies"])
        return cls(**parts | {"topologies": topologies})
