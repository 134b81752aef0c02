"""Step times on a cluster that is not here: of a bundle, of other towers, of other sizes.

- `predict_plan`: flat, SPTT and DMT side by side;
- `predict_placement`: DMT with every table on exactly the ranks that a plan names;
- `suggest`: the number of towers and the compression that would be fastest. The model's quality is
  not predicted: a suggestion is where to start measuring it;
- `predict_scaling`: how steps grow with the cluster while the batch per rank stays the same (weak
  scaling). Everything is spread perfectly evenly there, and memory is not looked at;
- `predict_bundle`: what `dmt plan` asks for of all this.

Letters: T towers, H hosts, R ranks per host, F features, N embedding dim, D output dim.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from dmt_convert.errors import ConfigError, PlanError
from dmt_convert.model import DmtSpec, TowerModuleSpec, TowerSpec, module_spec
from dmt_convert.placement import Cluster, TowerPlan, plan_model
from dmt_convert.placement.predict.cost_model import (
    StepLoad,
    StepTime,
    as_flat,
    as_passthrough,
    crossing_bytes,
    even_load,
    planned_load,
    step_time,
)
from dmt_convert.placement.predict.machine import Machine
from dmt_convert.spec import ModelSpec, TowerAssignment

Variant = Literal["flat", "flat2d", "sptt", "dmt"]

MIN_RANKS: Final = 16
"""Smallest cluster that scaling is predicted for."""
MAX_RANKS: Final = 16384
"""Largest cluster that is predicted."""
COMPRESSIONS: Final = (1, 2, 4, 8, 16)
"""Compressions that are tried; 1 is SPTT alone."""
MAX_TOWERS_PER_HOST: Final = 4
"""More towers than these on one host save nothing that fewer do not."""
TOLERANCE: Final = 0.03
"""The suggestion compresses as little as any candidate whose step is at most this much longer than
the fastest one's: compression costs quality, and the model is not more exact than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedStep:
    """One way to run the model."""

    variant: Variant
    """flat: hybrid parallelism; flat2d: the same in several copies; sptt: towers without
    compression; dmt: the bundle."""
    step: StepTime
    """Where its time goes."""
    speedup: float
    """Over flat."""
    forward_bytes: float
    """Per sample: what the busiest rank moves over its link of embeddings and tower outputs."""
    gradient_bytes: float
    """The same of their gradients."""
    copies: int = 1
    """flat2d: groups of hosts, each with all tables."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict, with times in milliseconds."""
        parts = {f"{f.name}_ms": getattr(self.step, f.name) * 1e3 for f in fields(self.step)}
        return {
            "variant": self.variant,
            "step_ms": self.step.total * 1e3,
            "speedup": self.speedup,
            "communication_ms": self.step.communication * 1e3,
            "compute_ms": self.step.compute * 1e3,
            **parts,
            "forward_bytes": self.forward_bytes,
            "gradient_bytes": self.gradient_bytes,
            **({"copies": self.copies} if self.copies > 1 else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted steps of a model in towers and of the flat one."""

    flat: PredictedStep
    """Flat hybrid parallelism, its tables spread evenly over all ranks."""
    sptt: PredictedStep
    """The towers uncompressed, their tables spread evenly over their hosts' ranks."""
    dmt: PredictedStep
    """The bundle, its tables spread like that."""
    flat_2d: PredictedStep | None = None
    """Flat in the fastest number of copies; None if memory holds only one."""

    @property
    def steps(self) -> tuple[PredictedStep, ...]:
        """Flat, SPTT, DMT."""
        return (self.flat, self.sptt, self.dmt)

    @property
    def rows(self) -> tuple[PredictedStep, ...]:
        """All of them."""
        return (self.flat, *([self.flat_2d] if self.flat_2d else []), self.sptt, self.dmt)


def check_ids_per_bag(ids_per_bag: float) -> None:
    """Refuse a mean number of ids that is not positive and finite.

    Raises:
        ConfigError: It is not positive and finite.
    """
    if not (math.isfinite(ids_per_bag) and ids_per_bag > 0):
        raise ConfigError(
            f"--ids-per-bag {ids_per_bag:g}",
            expected="a mean number of ids per sample and feature, above 0",
            hint="1 is single-hot, the default",
        )


def check_size(ranks: int) -> None:
    """Refuse a cluster that the model was not made for.

    Raises:
        ConfigError: It is too large.
    """
    if ranks > MAX_RANKS:
        raise ConfigError(
            f"{ranks} ranks to predict",
            expected=f"at most {MAX_RANKS}",
            hint="lower --hosts or --ranks-per-host",
        )


def predict_plan(
    model: DmtSpec, plan: TowerPlan, machine: Machine, *, ids_per_bag: float = 1.0
) -> Prediction:
    """Predict a bundle's step on the hosts that its plan gives its towers.

    Args:
        model: The converted model.
        plan: Where its tables lie; its cluster is the machine's.
        machine: What it runs on.
        ids_per_bag: Mean number of ids per sample and feature.

    Raises:
        ConfigError: The cluster is too large, or the number of ids is not positive.
    """
    check_ids_per_bag(ids_per_bag)
    check_size(plan.cluster.world_size)

    def planned(towers: DmtSpec) -> StepLoad:
        dtype = machine.comm_dtype
        return planned_load(towers, plan, ids_per_bag, comm_dtype=dtype, even_ranks=True)

    prediction = compare(
        even_load(as_flat(model.flat), plan.cluster, ids_per_bag),
        planned(as_passthrough(model)),
        planned(model),
        machine,
    )
    base = prediction.flat.step.total
    return replace(prediction, flat_2d=predict_copies(model.flat, machine, ids_per_bag, base))


def predict_copies(
    flat: ModelSpec, machine: Machine, ids_per_bag: float, base: float
) -> PredictedStep | None:
    """Predict flat with 2D parallelism: copies of all tables on groups of hosts.

    AlltoAlls stay inside a group. Gradients of dense parts are summed over all ranks, and the
    copies of tables are averaged every `sync_steps` steps, which nothing hides.

    Args:
        flat: The flat model.
        machine: What it runs on.
        ids_per_bag: Mean number of ids per sample and feature.
        base: Seconds of the flat step without copies.

    Returns:
        The fastest number of copies; None if the cluster has no memory for two.
    """
    cluster, network = machine.network.cluster, machine.network
    size = sum(table.rows * (table.dim * 4 + 4) for table in flat.tables)  # row-wise Adagrad
    found = []
    for copies in range(2, cluster.hosts + 1):
        hosts = cluster.hosts // copies
        ranks = hosts * cluster.ranks_per_host
        if cluster.hosts % copies or size > ranks * cluster.usable_bytes:
            continue
        group = replace(cluster, hosts=hosts)
        there = replace(machine, network=replace(network, cluster=group))
        load = even_load(as_flat(flat), group, ids_per_bag)
        step = step_time(load, there, copies=copies)
        sync = network.average_copies(size / ranks, copies) / network.assumptions.sync_steps
        step = replace(step, all_reduce=step.all_reduce + sync, exposed=step.exposed + sync)
        forward, gradients = crossing_bytes(load, there)
        found.append(
            PredictedStep(
                variant="flat2d",
                step=step,
                speedup=base / step.total,
                forward_bytes=forward,
                gradient_bytes=gradients,
                copies=copies,
            )
        )
    return min(found, key=lambda each: each.step.total, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStep:
    """The bundle with every table on exactly the ranks that its plan names."""

    step: StepTime
    """Where its time goes."""
    speedup: float
    """Over flat, whose tables are spread evenly."""
    busiest_rank: float
    """Bytes that the busiest rank looks up, over the mean rank's."""


def predict_placement(
    model: DmtSpec, plan: TowerPlan, machine: Machine, *, ids_per_bag: float = 1.0
) -> PlacedStep:
    """Predict what a plan's uneven ranks cost; arguments and errors are `predict_plan`'s."""
    check_ids_per_bag(ids_per_bag)
    check_size(plan.cluster.world_size)
    load = planned_load(model, plan, ids_per_bag, comm_dtype=machine.comm_dtype)
    flat = even_load(as_flat(model.flat), plan.cluster, ids_per_bag)
    step = step_time(load, machine)
    return PlacedStep(
        step=step,
        speedup=step_time(flat, machine).total / step.total,
        busiest_rank=load.lookup.row_bytes / load.lookup.mean_row_bytes,
    )


def compare(flat: StepLoad, sptt: StepLoad, dmt: StepLoad, machine: Machine) -> Prediction:
    """Predict three ways to run a model, side by side."""
    base = step_time(flat, machine)

    def row(variant: Variant, load: StepLoad) -> PredictedStep:
        step = step_time(load, machine)
        forward, gradients = crossing_bytes(load, machine)
        return PredictedStep(
            variant=variant,
            step=step,
            speedup=base.total / step.total,
            forward_bytes=forward,
            gradient_bytes=gradients,
        )

    return Prediction(flat=row("flat", flat), sptt=row("sptt", sptt), dmt=row("dmt", dmt))


def describe_machine(machine: Machine, ids_per_bag: float) -> dict[str, Any]:
    """Return everything that a prediction rests on, JSON-able."""
    cluster = machine.network.cluster
    gpu = asdict(machine.gpu)
    gpu |= {"flops_per_s": machine.gpu.flops_per_s}
    for name in ("peaks", "matmul_precision", "domain_ranks"):
        del gpu[name]
    for name in ("hbm_bytes", "intra_gbps", "inter_gbps"):
        gpu[name] = getattr(cluster, name)
    return {
        "modelled": True,
        "gpu": gpu,
        "hosts": cluster.hosts,
        "ranks_per_host": cluster.ranks_per_host,
        "batch": machine.batch,
        "comm_dtype": machine.embedding_dtype,
        "matmul_precision": machine.gpu.matmul_precision,
        "ids_per_bag": ids_per_bag,
        "assumptions": machine.network.assumptions.to_json(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of towers and compression."""

    towers: int
    """T."""
    compression: float
    """What it really is: D is a whole number."""
    seconds: float
    """Predicted step."""
    speedup: float
    """Over flat."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "towers": self.towers,
            "compression": self.compression,
            "step_ms": self.seconds * 1e3,
            "speedup": self.speedup,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What would be fastest."""

    best: Candidate
    """The least compression within `TOLERANCE` of the fastest step."""
    candidates: tuple[Candidate, ...]
    """All that fit, the fastest first."""
    refused: tuple[int, ...]
    """Numbers of towers whose tables do not fit the cluster's memory."""

    @property
    def worth_it(self) -> bool:
        """Whether the best candidate beats the flat model."""
        return self.best.speedup > 1

    def to_json(self, limit: int = 5) -> dict[str, Any]:
        """Return a JSON-able dict with the fastest candidates."""
        return {
            "suggestion": {**self.best.to_json(), "beats_flat": self.worth_it},
            "candidates": [candidate.to_json() for candidate in self.candidates[:limit]],
            "towers_that_do_not_fit": list(self.refused),
        }


def suggest(flat: ModelSpec, machine: Machine, *, ids_per_bag: float = 1.0) -> Suggestion:
    """Try numbers of towers and compressions for a flat model on the machine's cluster.

    Tables are dealt to towers by size alone, as evenly as they go: which features belong together
    is for `dmt partition` to say.

    Args:
        flat: The flat model.
        machine: What it runs on.
        ids_per_bag: Mean number of ids per sample and feature.

    Raises:
        PlanError: No number of towers fits.
        ConfigError: The cluster is too large, or the number of ids is not positive.
    """
    check_ids_per_bag(ids_per_bag)
    cluster = machine.network.cluster
    check_size(cluster.world_size)
    base = step_time(even_load(as_flat(flat), cluster, ids_per_bag), machine).total
    found: list[Candidate] = []
    refused: list[int] = []
    failure: PlanError | None = None
    for towers in tower_counts(cluster, len(flat.tables)):
        try:
            found += [
                Candidate(
                    towers=towers,
                    compression=compression,
                    seconds=seconds,
                    speedup=base / seconds,
                )
                for compression, seconds in _try_towers(flat, towers, machine, ids_per_bag)
            ]
        except PlanError as error:
            refused.append(towers)
            failure = error
    if not found:
        assert failure is not None
        raise failure
    found.sort(key=lambda c: (c.seconds, c.compression, c.towers))
    limit = found[0].seconds * (1 + TOLERANCE)
    best = min(
        (candidate for candidate in found if candidate.seconds <= limit),
        key=lambda c: (round(c.compression, 6), c.seconds, c.towers),
    )
    return Suggestion(best=best, candidates=tuple(found), refused=tuple(refused))


def tower_counts(cluster: Cluster, most: int) -> list[int]:
    """Return numbers of towers worth trying: the largest divisors of H, and small multiples.

    One tower over several hosts compresses nothing that crosses them, so it is tried only if
    there is no other number.

    Args:
        cluster: Where the model runs.
        most: Tables, of which every tower needs one.
    """
    hosts = cluster.hosts
    divisors = [towers for towers in range(1, min(hosts, most) + 1) if hosts % towers == 0]
    multiples = [hosts * n for n in range(2, MAX_TOWERS_PER_HOST + 1) if hosts * n <= most]
    found = divisors[-4:] + multiples
    return found[1:] if found[0] == 1 < hosts and len(found) > 1 else found


def deal_tables(flat: ModelSpec, towers: int) -> TowerAssignment:
    """Deal tables to towers, the largest first to whichever tower holds the fewest bytes.

    No tower gets more than its even number of tables, rounded up.

    Args:
        flat: The model.
        towers: T, at most as many as tables.
    """
    room = math.ceil(len(flat.tables) / towers)
    heap = [(0, tower, 0) for tower in range(towers)]
    tower_of: dict[str, int] = {}
    for table in sorted(flat.tables, key=lambda table: -table.nbytes):
        size, tower, held = heapq.heappop(heap)
        tower_of[table.name] = tower
        if held + 1 < room:
            heapq.heappush(heap, (size + table.nbytes, tower, held + 1))
    members: list[list[str]] = [[] for _ in range(towers)]
    for feature in flat.features:
        members[tower_of[feature.table]].append(feature.name)
    return TowerAssignment(towers=tuple(map(tuple, members)))


def dealt_model(flat: ModelSpec, towers: int, compression: float) -> DmtSpec | None:
    """Return a flat model in towers with its own kind of module.

    Args:
        flat: The model.
        towers: T.
        compression: At least this much; 1 for none.

    Returns:
        None if the embeddings are too narrow for that compression.
    """
    if compression > 1:
        try:
            module = module_spec(flat, "auto", num_towers=towers, compression=compression)
        except ConfigError:
            return None
    else:
        module = TowerModuleSpec(kind="passthrough")
    assignment = deal_tables(flat, towers)
    return DmtSpec(
        flat=flat,
        towers=tuple(TowerSpec(features=names, module=module) for names in assignment.towers),
    )


def _try_towers(
    flat: ModelSpec, towers: int, machine: Machine, ids_per_bag: float
) -> Iterator[tuple[float, float]]:
    """Yield compression and predicted seconds of every compression that can be had."""
    plan = None
    for compression in COMPRESSIONS:
        model = dealt_model(flat, towers, compression)
        if model is None:
            continue
        if plan is None:  # widths differ by one factor for all towers, so the plan is the same
            plan = plan_model(model, machine.network.cluster, host_memory=False)
        dtype = machine.comm_dtype
        load = planned_load(model, plan, ids_per_bag, comm_dtype=dtype, even_ranks=True)
        yield model.compression, step_time(load, machine).total


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """One size of cluster."""

    hosts: int
    """H."""
    ranks: int
    """H * R."""
    towers: int
    """T: the largest divisor of H that is not above the number of tables."""
    compression: float
    """Of the towers."""
    prediction: Prediction
    """The three step times."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        flat, sptt, dmt = (predicted.step for predicted in self.prediction.steps)
        return {
            "ranks": self.ranks,
            "hosts": self.hosts,
            "towers": self.towers,
            "compression": self.compression,
            "flat_ms": flat.total * 1e3,
            "sptt_ms": sptt.total * 1e3,
            "dmt_ms": dmt.total * 1e3,
            "flat_exposed_ms": flat.exposed * 1e3,
            "sptt_exposed_ms": sptt.exposed * 1e3,
            "dmt_exposed_ms": dmt.exposed * 1e3,
            "sptt_speedup": self.prediction.sptt.speedup,
            "dmt_speedup": self.prediction.dmt.speedup,
        }


def predict_scaling(
    flat: ModelSpec,
    machine: Machine,
    *,
    compression: float,
    ids_per_bag: float = 1.0,
    replicated_elements: int = 0,
) -> tuple[ScalePoint, ...]:
    """Predict clusters of 16 to 16,384 ranks, with the machine's ranks per host and links.

    Args:
        flat: The flat model.
        machine: What it runs on; its number of hosts does not matter.
        compression: Of all features; 1 for none.
        ids_per_bag: Mean number of ids per sample and feature.
        replicated_elements: Elements of the tables on every rank, whose gradients are summed.

    Raises:
        ConfigError: There are too many ranks per host, or the number of ids is not positive.
    """
    check_ids_per_bag(ids_per_bag)
    ranks_per_host = machine.network.cluster.ranks_per_host
    if ranks_per_host > MAX_RANKS:
        raise ConfigError(
            f"{ranks_per_host} ranks per host to predict",
            expected=f"at most {MAX_RANKS} ranks in all",
            hint="lower --ranks-per-host",
        )
    return tuple(
        _point(flat, hosts, machine, compression, ids_per_bag, replicated_elements)
        for hosts in _host_counts(ranks_per_host)
    )


def _host_counts(ranks_per_host: int) -> Iterator[int]:
    hosts = 1
    while hosts * ranks_per_host <= MAX_RANKS:
        if hosts * ranks_per_host >= MIN_RANKS:
            yield hosts
        hosts *= 2


def _point(
    flat: ModelSpec,
    hosts: int,
    machine: Machine,
    compression: float,
    ids_per_bag: float,
    replicated_elements: int,
) -> ScalePoint:
    cluster = replace(machine.network.cluster, hosts=hosts)
    there = replace(machine, network=replace(machine.network, cluster=cluster))
    most = min(hosts, len(flat.tables))
    towers = next(count for count in range(most, 0, -1) if hosts % count == 0)
    model = dealt_model(flat, towers, compression)
    if model is None:
        raise ConfigError(
            f"a compression of {compression:g}",
            expected="at most the embedding dim",
            hint="convert with less",
        )
    prediction = compare(
        even_load(as_flat(flat), cluster, ids_per_bag),
        even_load(as_passthrough(model), cluster, ids_per_bag, comm_dtype=machine.comm_dtype),
        replace(
            even_load(model, cluster, ids_per_bag, comm_dtype=machine.comm_dtype),
            replicated_elements=replicated_elements,
        ),
        there,
    )
    return ScalePoint(
        hosts=hosts,
        ranks=cluster.world_size,
        towers=towers,
        compression=model.compression,
        prediction=prediction,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReport:
    """What was predicted for a bundle; parts that were not asked for are None."""

    machine: Machine
    """What it was predicted for."""
    ids_per_bag: float
    """Mean number of ids per sample and feature."""
    prediction: Prediction | None = None
    """Flat, SPTT and DMT steps."""
    placed: PlacedStep | None = None
    """A DMT step with every table where the plan puts it."""
    suggestion: Suggestion | None = None
    """What would be fastest."""
    scaling: tuple[ScalePoint, ...] | None = None
    """Steps on other sizes of cluster."""

    def to_json(self) -> dict[str, Any]:
        """Return what `dmt plan --json` prints as `prediction`."""
        value = describe_machine(self.machine, self.ids_per_bag)
        if self.prediction is not None:
            value["rows"] = [step.to_json() for step in self.prediction.rows]
        if self.placed is not None:
            value["as_placed"] = {
                "step_ms": self.placed.step.total * 1e3,
                "speedup": self.placed.speedup,
                "busiest_rank": self.placed.busiest_rank,
            }
        if self.suggestion is not None:
            value |= self.suggestion.to_json()
        if self.scaling is not None:
            value["scaling"] = [point.to_json() for point in self.scaling]
        return value


def predict_bundle(
    model: DmtSpec,
    plan: TowerPlan,
    machine: Machine,
    ids_per_bag: float = 1.0,
    *,
    predict: bool = True,
    scaling: bool = False,
) -> PredictionReport:
    """Predict a bundle's steps.

    Args:
        model: The converted model.
        plan: Where its tables lie; its cluster is the machine's.
        machine: What it runs on.
        ids_per_bag: Mean number of ids per sample and feature.
        predict: Predict steps on the plan's cluster, and suggest towers for it.
        scaling: Predict steps on clusters of other sizes.

    Raises:
        ConfigError: The cluster is too large, or the number of ids is not positive and finite.
        PlanError: No number of towers fits the cluster's memory.
    """
    report = PredictionReport(machine=machine, ids_per_bag=ids_per_bag)
    if predict:
        report = replace(
            report,
            prediction=predict_plan(model, plan, machine, ids_per_bag=ids_per_bag),
            placed=predict_placement(model, plan, machine, ids_per_bag=ids_per_bag),
            suggestion=suggest(model.flat, machine, ids_per_bag=ids_per_bag),
        )
    if scaling:
        everywhere = [placed for placed in plan.tables if placed.is_everywhere]
        points = predict_scaling(
            model.flat,
            machine,
            compression=model.compression,
            ids_per_bag=ids_per_bag,
            replicated_elements=sum(placed.rows * placed.cols for placed in everywhere),
        )
        report = replace(report, scaling=points)
    return report
