"""The tower partitioner: which features form which tower.

Letters: F features, T towers, U units (features that must share a tower).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmt_convert.arrays import Float64Array, FloatArray, IntArray
from dmt_convert.config import PartitionOptions
from dmt_convert.conversion.partition.joint_code import JointCodes
from dmt_convert.conversion.partition.loss_search import Found, search_by_loss
from dmt_convert.conversion.partition.search import (
    assign_cyclically,
    find_start,
    pair_costs,
    search_towers,
)
from dmt_convert.conversion.partition.units import EMITTED_BYTES_PER_ELEMENT, Units, build_units
from dmt_convert.documents import read_json
from dmt_convert.errors import PartitionError
from dmt_convert.spec import ModelSpec, TowerAssignment

Towers = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLoad:
    """What one tower costs."""

    features: int
    """Number of features."""
    table_bytes: int
    """Size of its tables as stored, in bytes."""
    lookups: float
    """Ids looked up per sample (one per feature if the caller does not know)."""
    emitted_bytes: int
    """Pooled embeddings per sample, uncompressed, fp32, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Partition:
    """Towers, and how they were found."""

    assignment: TowerAssignment
    """The towers: features in model order, towers by their first feature."""
    strategy: str
    """loss, coherent, diverse, round-robin or file."""
    affinity_kind: str | None
    """cosine, weights, or saved: what one code for two features saves; None without affinity."""
    affinity: FloatArray | None
    """Affinity in model order, shape (F, F), if one was given."""
    loads: tuple[TowerLoad, ...]
    """What every tower costs."""
    within_affinity: float | None
    """Mean affinity of pairs that share a tower; None without affinity or such pairs."""
    between_affinity: float | None
    """Mean affinity of all other pairs; None without affinity or such pairs."""
    everywhere: Towers = ()
    """Features of the towers whose tables every rank holds: the last ones."""
    sample: str = ""
    """How the rows were drawn on which affinity was measured."""
    search: str = ""
    """loss: what was computed."""
    lost: float | None = None
    """loss: the part of the logits' variance that linear codes lose, to first order."""
    elements: int | None = None
    """loss: elements that all towers were planned to emit together."""

    def __repr__(self) -> str:
        """Say the essentials in one line."""
        return f"<Partition: {len(self.assignment.towers)} towers, {self.strategy}>"

    @property
    def towers(self) -> Towers:
        """Features of every tower."""
        return self.assignment.towers

    @property
    def sending(self) -> Towers:
        """Features of the towers that are placed on hosts."""
        return self.towers[: len(self.towers) - len(self.everywhere)]


def partition_features(
    spec: ModelSpec,
    config: PartitionOptions,
    affinity: FloatArray | None = None,
    *,
    codes: JointCodes | None = None,
    lookups: Mapping[str, float] | None = None,
) -> Partition:
    """Partition a model's features into towers.

    - loss: linear codes of the towers lose as little as a local search can make them.
    - coherent, diverse: the summed affinity inside towers is made as high, or as low, as an
      iterated local search can make it.
    - round-robin: feature i goes to tower i mod T. If features share a table or constraints forbid
      a tower, whole units take turns and go to the next tower that may hold them.
    - a file: taken as it is, checked against the model and the constraints. The ratios do not
      apply to it.

    Args:
        spec: The flat model.
        config: The request.
        affinity: Affinity in [0, 1], symmetric, shape (F, F), features in model order. Required
            for coherent and diverse (see `needs_affinity`); otherwise only reported.
        codes: What codes of several features lose. Required for loss; its affinity is what codes
            of two features save.
        lookups: Mean ids per sample of every feature; 1 for features that are not given.

    Raises:
        PartitionError: The request cannot be met, or the file does not fit the model.

    Source: the DMT paper, "Tower Partitioner", but for the search: on the affinities themselves it
    finds better towers in less time than in the paper's plane (benchmarks/partition_search.py).
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
    found: Found | None = None
    kind: str | None = None if affinity is None else config.affinity
    if isinstance(config.strategy, Path):
        towers = read_towers(config.strategy, spec, config, units)
    elif config.strategy == "loss":
        assert config.towers is not None
        found, kind = _search_by_loss(units, config, config.towers, codes), "saved"
        affinity = _scale_savings(found.savings)
        towers = _collect(spec, found.assignment[units.unit_of])
    else:
        towers = _collect(spec, _assign_units(units, config, affinity)[units.unit_of])
    assignment = TowerAssignment(towers=towers)
    within, between = _measure_affinity(spec, assignment, affinity)
    return Partition(
        assignment=assignment,
        strategy="file" if isinstance(config.strategy, Path) else config.strategy,
        affinity_kind=kind,
        affinity=affinity,
        loads=measure_loads(spec, assignment, lookups=lookups),
        within_affinity=within,
        between_affinity=between,
        search="" if found is None else found.how,
        lost=None if found is None else found.lost,
        elements=None if codes is None else codes.elements,
    )


def _search_by_loss(
    units: Units, config: PartitionOptions, num_towers: int, codes: JointCodes | None
) -> Found:
    if codes is None:
        raise PartitionError(
            "no sampled rows for the loss strategy",
            expected="embeddings of sampled rows, and the logit's gradient by them",
            hint="measure them, or use --partition coherent",
        )
    rng = np.random.default_rng(config.seed)
    return search_by_loss(find_start(units, num_towers, config, rng=rng), codes, rng=rng)


def _scale_savings(savings: Float64Array) -> Float64Array:
    """Bring savings into [0, 1], the best pair 1, diagonal 1."""
    scaled = np.maximum(savings, 0)
    scaled /= float(scaled.max(initial=0.0)) or 1.0
    np.fill_diagonal(scaled, 1)
    return np.asarray(scaled)


def needs_affinity(config: PartitionOptions) -> bool:
    """Tell whether `partition_features` needs an affinity matrix for this request."""
    return config.strategy in ("coherent", "diverse")


def _assign_units(units: Units, config: PartitionOptions, affinity: FloatArray | None) -> IntArray:
    """Tower of every unit, shape (U,)."""
    assert config.towers is not None
    rng = np.random.default_rng(config.seed)
    start = find_start(units, config.towers, config, rng=rng)
    if config.strategy == "round-robin":
        return assign_cyclically(start, rng=rng)
    assert affinity is not None
    pair_UU = pair_costs(units, affinity, coherent=config.strategy == "coherent")
    return search_towers(start, pair_UU, rng=rng)


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
            emitted_bytes=sum(
                EMITTED_BYTES_PER_ELEMENT * tables[table_of[name]].dim for name in tower
            ),
        )
        for tower in assignment.towers
    )


def read_towers(path: Path, spec: ModelSpec, config: PartitionOptions, units: Units) -> Towers:
    """Read towers from a JSON file `{"towers": [["f0", "f3"], ...]}`, in canonical order.

    Raises:
        PartitionError: The file cannot be read; a feature is missing, repeated or unknown; features
            that share a table are split; a constraint is broken; or the number of towers is not
            the requested one. All problems are named at once.
    """
    towers = _parse_towers(path)
    problems = []
    if config.towers not in (None, len(towers)):
        problems.append(f"{len(towers)} towers instead of {config.towers}")
    problems += [f"tower {t} is empty" for t, tower in enumerate(towers) if not tower]
    known = dict.fromkeys(spec.feature_names)
    tower_of: dict[str, int] = {}
    for t, tower in enumerate(towers):
        for name in tower:
            if name in tower_of:
                problems.append(f"repeated: {name}")
            elif name not in known:
                problems.append(f"unknown: {name}")
            tower_of[name] = t
    problems += [f"missing: {name}" for name in known if name not in tower_of]
    if not problems:
        problems = list(_broken_constraints(spec, config, units, tower_of))
    if problems:
        raise PartitionError(
            f"the towers of {path} do not fit the model or the request",
            expected=f"each of the {len(known)} features in exactly one tower, features of one "
            "table in the same tower, and all constraints kept",
            hint="correct the file; `dmt partition --out` writes one that fits",
            details=problems,
        )
    return _collect(spec, [tower_of[name] for name in known])


def _parse_towers(path: Path) -> list[list[str]]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
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
            f"partition file {path} does not contain a list of towers",
            expected='{"towers": [["f0", "f3"], ...]}, feature names in lists',
            hint="let `dmt partition --out` write the file",
        )
    return towers


def _broken_constraints(
    spec: ModelSpec, config: PartitionOptions, units: Units, tower_of: Mapping[str, int]
) -> Iterator[str]:
    for members in units.members:
        names = [spec.features[i].name for i in members]
        found = sorted({tower_of[name] for name in names})
        if len(found) > 1:
            yield (
                f"{','.join(names)} share a table or must be together, but are in towers "
                f"{', '.join(map(str, found))}"
            )
    for rivals in config.apart:
        if len({tower_of[name] for name in rivals}) < len(rivals):
            yield f"{','.join(rivals)} must be apart, but share a tower"
    group_of = {name: group for group, names in config.group for name in names}
    for t in sorted(set(tower_of.values())):
        met = dict.fromkeys(
            group_of[name] for name, tower in tower_of.items() if tower == t and name in group_of
        )
        if len(met) > 1:
            yield f"groups {', '.join(met)} share tower {t}"


def _check_affinity(affinity: FloatArray, features: int) -> None:
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
            hint="use cosine_affinity or weights_affinity; NaN and Inf come from the tables",
        )


def _collect(spec: ModelSpec, tower_of: Sequence[int] | IntArray) -> Towers:
    """Features in model order, towers by their first feature."""
    towers: dict[int, list[str]] = {}
    for feature, tower in zip(spec.features, tower_of, strict=True):
        towers.setdefault(int(tower), []).append(feature.name)
    return tuple(tuple(names) for names in towers.values())


def _measure_affinity(
    spec: ModelSpec, assignment: TowerAssignment, affinity: FloatArray | None
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
