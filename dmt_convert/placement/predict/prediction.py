"""Step times of a bundle on a cluster that is not here: flat, SPTT and DMT beside each other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from dmt_convert.errors import ConfigError
from dmt_convert.model import DmtSpec
from dmt_convert.placement import TowerPlan
from dmt_convert.placement.predict.cost_model import Machine, StepTime, step_time
from dmt_convert.placement.predict.step_load import (
    StepLoad,
    as_flat,
    as_passthrough,
    even_load,
    planned_load,
)

Variant = Literal["flat", "sptt", "dmt"]

MAX_RANKS: Final = 16384
"""Largest cluster that is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedStep:
    """One way to run the model."""

    variant: Variant
    """flat: hybrid parallelism; sptt: towers without compression; dmt: the bundle."""
    step: StepTime
    """Where its time goes."""
    speedup: float
    """Over flat."""

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
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the cost model says of a model in towers beside the flat one."""

    flat: PredictedStep
    """Flat hybrid parallelism, its tables spread evenly over all ranks."""
    sptt: PredictedStep
    """The towers uncompressed, their tables spread evenly over their hosts' ranks."""
    dmt: PredictedStep
    """The bundle, its tables spread like that."""

    @property
    def steps(self) -> tuple[PredictedStep, ...]:
        """Flat, SPTT, DMT."""
        return (self.flat, self.sptt, self.dmt)


def check_ids_per_bag(ids_per_bag: float) -> None:
    """Refuse what is no mean number of ids.

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
        ConfigError: The cluster is too large, or the number of ids is none.
    """
    check_ids_per_bag(ids_per_bag)
    check_size(plan.cluster.world_size)
    return compare(
        even_load(as_flat(model.flat), plan.cluster, ids_per_bag),
        planned_load(as_passthrough(model), plan, ids_per_bag, even_ranks=True),
        planned_load(model, plan, ids_per_bag, even_ranks=True),
        machine,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStep:
    """The bundle with every table on exactly the ranks that its plan names."""

    step: StepTime
    """Where its time goes."""
    busiest_rank: float
    """Bytes that the busiest rank looks up, over the mean rank's."""


def predict_placement(
    model: DmtSpec, plan: TowerPlan, machine: Machine, *, ids_per_bag: float = 1.0
) -> PlacedStep:
    """Predict what a plan's uneven ranks cost; arguments and errors are `predict_plan`'s."""
    check_ids_per_bag(ids_per_bag)
    check_size(plan.cluster.world_size)
    load = planned_load(model, plan, ids_per_bag)
    return PlacedStep(
        step=step_time(load, machine),
        busiest_rank=load.lookup.row_bytes / load.lookup.mean_row_bytes,
    )


def compare(flat: StepLoad, sptt: StepLoad, dmt: StepLoad, machine: Machine) -> Prediction:
    """Predict three ways to run a model, side by side."""
    base = step_time(flat, machine)

    def row(variant: Variant, load: StepLoad) -> PredictedStep:
        step = step_time(load, machine)
        return PredictedStep(variant=variant, step=step, speedup=base.total / step.total)

    return Prediction(flat=row("flat", flat), sptt=row("sptt", sptt), dmt=row("dmt", dmt))


def describe_machine(machine: Machine, ids_per_bag: float) -> dict[str, Any]:
    """Return everything that a prediction rests on, JSON-able."""
    cluster = machine.network.cluster
    gpu = asdict(machine.gpu)
    for name in ("hbm_bytes", "intra_gbps", "inter_gbps"):
        gpu[name] = getattr(cluster, name)
    return {
        "modelled": True,
        "gpu": gpu,
        "hosts": cluster.hosts,
        "ranks_per_host": cluster.ranks_per_host,
        "batch": machine.batch,
        "comm_dtype": machine.comm_dtype,
        "ids_per_bag": ids_per_bag,
        "assumptions": machine.network.assumptions.to_json(),
    }
