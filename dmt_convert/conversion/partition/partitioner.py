"""The tower partitioner: which features form which tower.

Letters: F features, T towers, U units (features that cannot be parted).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmt_convert.conversion.partition.balanced_kmeans import (
    assign_cyclically,
    cluster_units,
    plan_bounds,
)
from dmt_convert.conversion.partition.config import PartitionConfig, needs_affinity
from dmt_convert.conversion.partition.embedding import embed_features
from dmt_convert.conversion.partition.units import FloatArray, IntArray, Units, build_units
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec, TowerAssignment

AnyFloats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLoad:
    """What one tower costs."""

    features: int
    """Number of features."""
    table_bytes: int
    """Size of its tables as stored, in bytes."""
    lookups: float
    """Ids looked up per sample (one per feature unless the caller knew better)."""
    emitted_bytes: int
    """Pooled embeddings per sample, uncompressed, fp32, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """Towers, and how they came about."""

    assignment: TowerAssignment
    """The towers: features in model order, towers by their first feature."""
    strategy: str
    """coherent, diverse, round-robin or file."""
    affinity_kind: str | None
    """cosine or weights; None where no affinity was given."""
    affinity: AnyFloats | None
    """Affinity in model order, shape (F, F), where one was given."""
    points: npt.NDArray[np.float64] | None
    """Points of the features in model order, shape (F, 2); coherent and diverse only."""
    loads: tuple[TowerLoad, ...]
    """What every tower costs."""
    within_affinity: float | None
    """Mean affinity of pairs that share a tower; None without affinity or such pairs."""
    between_affinity: float | None
    """Mean affinity of pairs that share none; None without affinity or such pairs."""


def partition_features(
    spec: ModelSpec,
    config: PartitionConfig,
    affinity: AnyFloats | None = None,
    *,
    lookups: Mapping[str, float] | None = None,
) -> Partition:
    """Partition a model's features into towers.

    coherent and diverse follow the paper: affinity, distance (1 - affinity, or affinity), points
    in the plane, balanced clusters. round-robin puts feature i into tower i mod T; where features
    cannot be parted or constraints forbid a tower, whole units take turns and go to the next
    tower that may hold them. A file is taken as it is, checked against the model and the
    constraints; the ratios do not bind it.

    Args:
        spec: The flat model.
        config: The request.
        affinity: Affinity in [0, 1], symmetric, shape (F, F), features in model order. Needed for
            coherent and diverse (see `needs_affinity`); elsewhere only measured.
        lookups: Mean ids per sample of every feature, where known; one where not.

    Raises:
        PartitionError: The request cannot be met, or the file does not fit the model.

    Source: the DMT paper, "Tower Partitioner".
    """
    units = build_units(spec, config, lookups=lookups)
    if affinity is not None:
        _check_affinity(affinity, len(spec.features))
    elif needs_affinity(config):
        raise PartitionError(
            f"no affinity for the {config.strategy} strategy",
            expected=f"an affinity matrix for {len(spec.features)} features",
            hint="compute one from sampled rows, or use --partition round-robin",
        )
    points = None
    if isinstance(config.strategy, Path):
        towers = read_towers(config.strategy, spec, config, units)
    else:
        tower_of_unit, points = _search_towers(units, config, affinity)
        towers = _collect(spec, tower_of_unit[units.unit_of])
    assignment = TowerAssignment(towers=towers)
    within, between = _measure_affinity(spec, assignment, affinity)
    return Partition(
        assignment=assignment,
        strategy="file" if isinstance(config.strategy, Path) else config.strategy,
        affinity_kind=None if affinity is None else config.affinity,
        affinity=affinity,
        points=points,
        loads=measure_loads(spec, assignment, lookups=lookups),
        within_affinity=within,
        between_affinity=between,
    )


def _search_towers(
    units: Units, config: PartitionConfig, affinity: AnyFloats | None
) -> tuple[IntArray, FloatArray | None]:
    """Tower of every unit, shape (U,), and the features' points, if any."""
    assert config.num_towers is not None
    rng = np.random.default_rng(config.seed)
    start = plan_bounds(units, config.num_towers, config, rng=rng)
    if config.strategy == "round-robin":
        return assign_cyclically(start, units, rng=rng), None
    assert affinity is not None
    distance = _to_distance(affinity, coherent=config.strategy == "coherent")
    points = embed_features(distance, rng=rng)
    return cluster_units(start, units, points, distance, rng=rng), points


def measure_loads(
    spec: ModelSpec, assignment: TowerAssignment, *, lookups: Mapping[str, float] | None = None
) -> tuple[TowerLoad, ...]:
    """Add up what every tower costs; `lookups` as in `partition_features`."""
    tables = {table.name: table for table in spec.tables}
    table_of = {feature.name: feature.table for feature in spec.features}
    return tuple(
        TowerLoad(
            features=len(tower),
            table_bytes=sum(tables[t].nbytes for t in {table_of[name] for name in tower}),
            lookups=sum(1.0 if lookups is None else lookups.get(name, 1.0) for name in tower),
            emitted_bytes=sum(4 * tables[table_of[name]].dim for name in tower),
        )
        for tower in assignment.towers
    )


def read_towers(
    path: Path, spec: ModelSpec, config: PartitionConfig, units: Units
) -> tuple[tuple[str, ...], ...]:
    """Read towers from a JSON file `{"towers": [["f0", "f3"], ...]}`, in canonical order.

    Raises:
        PartitionError: The file cannot be read, forgets, repeats or makes up features, splits
            features that share a table, breaks a constraint, or has another number of towers
            than was asked for. All findings are named at once.
    """
    towers = _parse_towers(path)
    problems = []
    if config.num_towers not in (None, len(towers)):
        problems.append(f"{len(towers)} towers, where {config.num_towers} were asked for")
    problems += [f"tower {t} is empty" for t, tower in enumerate(towers) if not tower]
    index = {name: i for i, name in enumerate(spec.feature_names)}
    tower_of: dict[str, int] = {}
    for t, tower in enumerate(towers):
        for name in tower:
            if name in tower_of:
                problems.append(f"repeated: {name}")
            elif name not in index:
                problems.append(f"unknown: {name}")
            tower_of[name] = t
    problems += [f"forgotten: {name}" for name in index if name not in tower_of]
    if not problems:
        problems = _broken_constraints(spec, config, units, tower_of)
    if problems:
        raise PartitionError(
            f"the towers of {path} do not fit the model or the request",
            expected=f"each of the {len(index)} features in exactly one tower, features of one "
            "table in the same, and the constraints kept",
            hint="mend the file; `dmt partition` writes one that fits",
            details=problems,
        )
    return _collect(spec, np.array([tower_of[name] for name in index]))


def _parse_towers(path: Path) -> list[list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PartitionError(
            f"partition file {path} cannot be read: {error}",
            expected='a JSON file {"towers": [["f0", "f3"], ...]}',
            hint="check the path and the file",
        ) from error
    towers = content.get("towers") if isinstance(content, dict) else None
    if not isinstance(towers, list) or not all(
        isinstance(tower, list) and all(isinstance(name, str) for name in tower) for tower in towers
    ):
        raise PartitionError(
            f"partition file {path} holds no list of towers",
            expected='{"towers": [["f0", "f3"], ...]}, feature names in lists',
            hint="write it as `dmt partition --out` does",
        )
    return towers


def _broken_constraints(
    spec: ModelSpec, config: PartitionConfig, units: Units, tower_of: Mapping[str, int]
) -> list[str]:
    problems = []
    for members in units.members:
        names = [spec.features[i].name for i in members]
        found = sorted({tower_of[name] for name in names})
        if len(found) > 1:
            problems.append(
                f"{','.join(names)} share tables or must be together, and are in towers "
                f"{', '.join(map(str, found))}"
            )
    for rivals in config.apart:
        if len({tower_of[name] for name in rivals}) < len(rivals):
            problems.append(f"{','.join(rivals)} must be apart, and share a tower")
    group_of = {name: group for group, names in config.groups for name in names}
    for t in sorted(set(tower_of.values())):
        met = dict.fromkeys(
            group_of[name] for name, tower in tower_of.items() if tower == t and name in group_of
        )
        if len(met) > 1:
            problems.append(f"groups {', '.join(met)} share tower {t}")
    return problems


def _check_affinity(affinity: AnyFloats, features: int) -> None:
    problem = None
    if affinity.shape != (features, features):
        problem = f"an affinity of shape {affinity.shape} for {features} features"
    elif not np.isfinite(affinity).all():
        problem = "an affinity that is not finite everywhere"
    elif affinity.min() < -1e-6 or affinity.max() > 1 + 1e-6:
        problem = f"an affinity between {affinity.min():.4g} and {affinity.max():.4g}"
    elif not np.allclose(affinity, affinity.T, atol=1e-5):
        problem = "an affinity that is not symmetric"
    if problem:
        raise PartitionError(
            problem,
            expected=f"a symmetric ({features}, {features}) matrix in [0, 1]",
            hint="use cosine_affinity or weights_affinity; values that are not finite come from "
            "tables that hold such",
        )


def _to_distance(affinity: AnyFloats, *, coherent: bool) -> npt.NDArray[np.float64]:
    distance = 1.0 - affinity if coherent else np.array(affinity, dtype=np.float64)
    np.fill_diagonal(distance, 0)
    return np.asarray(distance, dtype=np.float64)


def _collect(
    spec: ModelSpec, tower_of: Sequence[int] | npt.NDArray[np.int64]
) -> tuple[tuple[str, ...], ...]:
    """Features in model order, towers by their first feature."""
    towers: dict[int, list[str]] = {}
    for feature, tower in zip(spec.features, tower_of, strict=True):
        towers.setdefault(int(tower), []).append(feature.name)
    return tuple(tuple(names) for names in towers.values())


def _measure_affinity(
    spec: ModelSpec, assignment: TowerAssignment, affinity: AnyFloats | None
) -> tuple[float | None, float | None]:
    """Mean affinity of the pairs inside towers, and of all others."""
    if affinity is None:
        return None, None
    index = {name: i for i, name in enumerate(spec.feature_names)}
    within, within_pairs = 0.0, 0
    for tower in assignment.towers:
        members = [index[name] for name in tower]
        block = affinity[np.ix_(members, members)]
        within += float(block.sum(dtype=np.float64) - np.trace(block)) / 2
        within_pairs += len(members) * (len(members) - 1) // 2
    features = len(affinity)
    total = float(affinity.sum(dtype=np.float64) - np.trace(affinity)) / 2
    between_pairs = features * (features - 1) // 2 - within_pairs
    return (
        within / within_pairs if within_pairs else None,
        (total - within) / between_pairs if between_pairs else None,
    )
