"""All ways of forming towers that are compared, in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmt_convert.config import STRATEGIES, PartitionConfig
from dmt_convert.conversion import Sample
from dmt_convert.conversion.partition import (
    measure_affinity,
    needs_affinity,
    partition_features,
)
from dmt_convert.families import FlatModelInfo

Towers = tuple[tuple[str, ...], ...]
Affinities = dict[str, npt.NDArray[np.float32]]

RANDOM = "random"
"""Prefix of the names of random partitions."""


def measure_affinities(info: FlatModelInfo, sample: Sample, kinds: Sequence[str]) -> Affinities:
    return {kind: measure_affinity(info, sample, kind) for kind in kinds}  # type: ignore[arg-type]


def list_partitions(
    info: FlatModelInfo,
    affinities: Affinities,
    towers: int,
    *,
    randoms: int,
    natural: Sequence[Sequence[str]] = (),
) -> dict[str, Towers]:
    """Name -> towers: every strategy, with every affinity where it needs one, and yardsticks.

    natural: groups that the data set names; each is split into equal towers, in its order.
    """
    found: dict[str, Towers] = {}
    for strategy in STRATEGIES:
        if not needs_affinity(PartitionConfig(towers=towers, partition=strategy)):  # type: ignore[arg-type]
            found[strategy] = _partition(info, strategy, towers)
            continue
        for kind, affinity in affinities.items():
            found[f"{strategy}, {kind}"] = _partition(info, strategy, towers, kind, affinity)
    names = info.spec.feature_names
    if natural and len(natural) <= towers:
        found["natural groups"] = _split_groups(natural, towers)
    for seed in range(randoms):
        order = np.random.default_rng((seed, len(names))).permutation(len(names))
        parts = np.array_split(order, towers)
        found[f"{RANDOM} {seed}"] = tuple(tuple(names[i] for i in sorted(part)) for part in parts)
    return found


def _partition(
    info: FlatModelInfo,
    strategy: str,
    towers: int,
    kind: str = "cosine",
    affinity: npt.NDArray[np.float32] | None = None,
) -> Towers:
    config = PartitionConfig(towers=towers, partition=strategy, affinity=kind)  # type: ignore[arg-type]
    return partition_features(info.spec, config, affinity).assignment.towers


def _split_groups(groups: Sequence[Sequence[str]], towers: int) -> Towers:
    """Give groups towers in proportion to their features, one each at least."""
    counts = [1] * len(groups)
    for _ in range(towers - len(groups)):
        sizes = [len(group) / count for group, count in zip(groups, counts, strict=True)]
        counts[int(np.argmax(sizes))] += 1
    return tuple(
        tuple(part.tolist())
        for group, count in zip(groups, counts, strict=True)
        for part in np.array_split(np.array(group), count)
    )


def read_groups(data: Path) -> list[list[str]]:
    """Groups that the schema.json of a data set names: generated ones, or natural ones.

    Natural groups are text such as "year, genre1-3, mpaa".
    """
    schema = json.loads((data / "schema.json").read_text(encoding="utf-8"))
    if "groups" in schema:
        return [list(group) for group in schema["groups"]]
    groups = schema.get("feature_groups", {}).values()
    return [[name for entry in text.split(", ") for name in _expand(entry)] for text in groups]


def _expand(entry: str) -> list[str]:
    """genre1-3 stands for genre1, genre2, genre3."""
    span = re.fullmatch(r"(.*?)(\d+)-(\d+)", entry)
    if span is None:
        return [entry]
    return [f"{span[1]}{i}" for i in range(int(span[2]), int(span[3]) + 1)]


def share_together(towers: Towers, groups: Sequence[Sequence[str]]) -> float:
    """Share of the pairs inside towers that belong to one group."""
    group_of = {name: g for g, group in enumerate(groups) for name in group}
    pairs = [
        group_of[a] == group_of[b]
        for tower in towers
        for i, a in enumerate(tower)
        for b in tower[:i]
    ]
    return float(np.mean(pairs))


def off_diagonal(affinity: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rows, columns = np.triu_indices(len(affinity), 1)
    return affinity[rows, columns]
