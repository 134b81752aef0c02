"""What a user can ask of the tower partitioner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from dmt_convert.errors import ConfigError

Strategy = Literal["coherent", "diverse", "round-robin"]
AffinityKind = Literal["cosine", "weights"]

STRATEGIES: Final[tuple[str, ...]] = get_args(Strategy)
AFFINITY_KINDS: Final[tuple[str, ...]] = get_args(AffinityKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionConfig:
    """How features become towers."""

    num_towers: int | None = None
    """Number of towers T; None only where `strategy` is a file, which says it itself."""
    strategy: Strategy | Path = "coherent"
    """coherent: features that interact sit together; diverse: they sit apart; round-robin:
    feature i in tower i mod T; a path: a JSON file `{"towers": [["f0", "f3"], ...]}`."""
    affinity: AffinityKind = "weights"
    """Which affinity coherent and diverse go by."""
    size_ratio: float = 1.0
    """At most ceil(size_ratio * F / T) features per tower. 1 asks for sizes as equal as the
    features allow (within one, unless features that cannot be parted forbid it); above 1 it is a
    bound that is kept or refused."""
    load_ratio: float | None = None
    """No tower's load (bytes of tables, lookups per sample, bytes emitted) exceeds this times
    the mean; a feature that exceeds it alone sits with features that add nothing to that load."""
    together: tuple[tuple[str, ...], ...] = ()
    """Features of one tuple share a tower."""
    apart: tuple[tuple[str, ...], ...] = ()
    """Features of one tuple are pairwise in different towers."""
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Name and features of every group; features of different groups never share a tower,
    features of no group go anywhere."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._constraint_problems()]
        if problems:
            raise ConfigError(
                "the partition options do not hold together" if len(problems) > 1 else problems[0],
                expected="--towers of 1 or more, ratios of 1 or more, a strategy out of "
                f"{', '.join(STRATEGIES)} or a file, and lists of two or more different features",
                hint="correct the options named",
                details=problems if len(problems) > 1 else (),
            )

    def _number_problems(self) -> Iterable[str]:
        if self.num_towers is None and not isinstance(self.strategy, Path):
            yield f"strategy {self.strategy} without a number of towers"
        if self.num_towers is not None and self.num_towers < 1:
            yield f"{self.num_towers} towers"
        if not isinstance(self.strategy, Path) and self.strategy not in STRATEGIES:
            yield f"strategy {self.strategy!r}"
        if self.affinity not in AFFINITY_KINDS:
            yield f"affinity {self.affinity!r}, which is none of {', '.join(AFFINITY_KINDS)}"
        if not (math.isfinite(self.size_ratio) and self.size_ratio >= 1):
            yield f"size ratio {self.size_ratio}"
        if self.load_ratio is not None and not (
            math.isfinite(self.load_ratio) and self.load_ratio >= 1
        ):
            yield f"load ratio {self.load_ratio}"
        if self.seed < 0:
            yield f"seed {self.seed}, which is negative"

    def _constraint_problems(self) -> Iterable[str]:
        for option, tuples in (("together", self.together), ("apart", self.apart)):
            for names in tuples:
                if len(names) < 2 or _repeated(names):
                    yield f"{option} {','.join(names)}: fewer than two, or repeated, features"
        for name in _repeated([name for name, _ in self.groups]):
            yield f"group {name} is given twice"
        for name, features in self.groups:
            if not features or _repeated(features):
                yield f"group {name}={','.join(features)}: no, or repeated, features"
        members = [feature for _, features in self.groups for feature in set(features)]
        for feature in _repeated(members):
            yield f"feature {feature} is in several groups"


def needs_affinity(config: PartitionConfig) -> bool:
    """Tell whether `partition_features` needs an affinity matrix for this request."""
    return config.strategy in ("coherent", "diverse")


def _repeated(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for name in names:
        if name in seen:
            repeated[name] = None
        seen.add(name)
    return list(repeated)
