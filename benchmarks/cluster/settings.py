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

Family = Literal["flat", "torchrec-towers", "sptt", "dmt", "coded"]
Precision = Literal["fp32", "bf16", "int8", "mixed"]

FLATS: Final = ("flat", "flat-bf16", "flat-int8")
"""The flat variants, which all others are compared with."""
DEFAULT_VARIANTS: Final = (
    "flat,flat-bf16,"
    "torchrec-towers-c1,torchrec-towers-c2,torchrec-towers-c4,torchrec-towers-c8,"
    "sptt,sptt-bf16,dmt-c2,dmt-c4,dmt-c8,dmt-c2-bf16,dmt-c4-bf16,dmt-c8-bf16"
)
CODED_VARIANTS: Final = (
    "flat,flat-bf16,flat-int8,"
    "coded-c4-prefetch,coded-c8-fixed-prefetch,coded-c16-fixed-prefetch,coded-c32-fixed-prefetch"
)
"""Towers that carry codes, beside every flat variant."""
_VARIANTS: Final = tuple(
    map(
        re.compile,
        (
            r"(?P<family>flat)(?:-(?P<precision>bf16|int8))?",
            r"(?P<family>torchrec-towers)-c(?P<compression>\d+)(?:-(?P<precision>bf16))?",
            r"(?P<family>sptt)(?P<prefetch>-prefetch)?(?:-(?P<precision>bf16))?",
            r"(?P<family>dmt)-c(?P<compression>\d+)(?P<prefetch>-prefetch)?"
            r"(?:-(?P<precision>bf16|int8))?",
            r"(?P<family>coded)-c(?P<compression>\d+)(?:-(?P<precision>mixed))?"
            r"(?P<uncoded>-uncoded)?(?P<fixed>-fixed)?(?P<prefetch>-prefetch)?",
        ),
    )
)
_FULL_WIDTH: Final = 4
"""Compression at which int8 has an element for every one of the embeddings."""
_MAX_RANKS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantName:
    """What the name of a variant says."""

    family: Family
    """flat: TorchRec, table-wise; torchrec-towers: TorchRec's towers as they ship; sptt: our
    engine with passthrough towers; dmt: our engine with a map per feature; coded: our engine with
    towers that carry codes, linear ones beyond compression 4."""
    compression: int
    """coded: bytes that cross hosts in the flat model as float32, over those of the towers. Others:
    the same at equal precision, N / D."""
    precision: Precision
    """Of the exchanges. bf16 stands for 16 bits: TorchRec's codecs take fp16 on a CPU. int8: with a
    scale in TorchRec, as levels in our engine. mixed: as many elements in 4 bits as in 8."""
    prefetch: bool
    """Whether the ids of the next batch travel during this one's step (our engine only)."""
    uncoded: bool = False
    """coded: whether the same towers send float32 instead, a check of the codes."""
    fixed: bool = False
    """coded: whether the maps that restore embeddings stay as they are. Their gradients, summed
    over all ranks, are in proportion at the batch of a cluster, and not at the batch here."""

    @property
    def is_linear(self) -> bool:
        """Whether towers are combined by linear maps."""
        return self.family == "coded" and self.compression > _FULL_WIDTH

    @property
    def model(self) -> str:
        """The model that it trains: variants of one model start with the same loss."""
        if self.is_linear:
            return f"linear {self.compression} {self.precision}"
        maps = self.family in ("dmt", "torchrec-towers") and self.compression > 1
        return f"vectors {self.compression}" if maps else "flat"

    @property
    def baseline(self) -> str:
        """The flat variant that it is compared with: the one of its own precision.

        What carries codes is compared with fp32, which its compression is counted from.
        """
        if self.family == "coded" or self.precision == "fp32":
            return "flat"
        return f"flat-{self.precision}"

    @property
    def torchrec_rival(self) -> str | None:
        """TorchRec's towers that send as many bytes; None for what is TorchRec's own."""
        if self.family not in ("sptt", "dmt"):
            return None
        suffix = "" if self.precision == "fp32" else f"-{self.precision}"
        return f"torchrec-towers-c{self.compression}{suffix}"


def parse_variant(text: str, *, dim: int) -> VariantName:
    """Read a variant's name.

    Args:
        text: Such as `flat-bf16`, `torchrec-towers-c4`, `sptt`, `dmt-c8-bf16` or `coded-c16`.
        dim: N, which the compression has to divide; for codes, the bytes of an embedding.

    Raises:
        ConfigError: There is no such variant.
    """
    match = next((found for each in _VARIANTS if (found := each.fullmatch(text))), None)
    parts: dict[str, Any] = match.groupdict() if match else {}
    compression = int(parts.get("compression") or 1)
    is_coded = parts.get("family") == "coded"
    whole = dim * _FULL_WIDTH if is_coded else dim
    too_small = is_coded and (
        compression < _FULL_WIDTH
        or (compression == _FULL_WIDTH and (parts["fixed"] or parts["precision"]))
    )
    if match is None or compression < 1 or whole % compression or too_small:
        raise ConfigError(
            f"--variants has {text!r}",
            expected="flat, flat-bf16, flat-int8; torchrec-towers-cX, sptt or dmt-cX, the latter "
            "two with or without -prefetch, then all with or without -bf16, dmt-cX also with "
            f"-int8, X divides {dim}; "
            "coded-cX with or without -mixed, -uncoded, -fixed, -prefetch in this order, X from 4 "
            f"divides {dim * _FULL_WIDTH} (-mixed and -fixed above 4)",
            hint=f"the default is {DEFAULT_VARIANTS}; for codes, {CODED_VARIANTS}",
        )
    return VariantName(
        family=parts["family"],
        compression=compression,
        precision=parts.get("precision") or ("int8" if is_coded else "fp32"),
        prefetch=bool(parts.get("prefetch")),
        uncoded=bool(parts.get("uncoded")),
        fixed=bool(parts.get("fixed")),
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
