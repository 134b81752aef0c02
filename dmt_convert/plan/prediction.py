"""Step times of a bundle on a cluster that is not here: flat, SPTT and DMT beside each other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from dmt_convert.errors import ConfigError
from dmt_convert.plan.cost_model import Machine, StepTime, flat_step, tower_step
from dmt_convert.plan.step_load import as_passthrough, flat_load, planned_load
from dmt_convert.plan.tower_plan import TowerPlan
from dmt_convert.towers import DmtSpec

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
    """What the cost model says of a plan."""

    flat: PredictedStep
    """Flat hybrid parallelism with tables spread perfectly."""
    sptt: PredictedStep
    """The plan's towers, uncompressed."""
    dmt: PredictedStep
    """The bundle."""

    @property
    def steps(self) -> tuple[PredictedStep, ...]:
        """All three."""
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
    """Predict a bundle's step on the ranks that its plan gives it.

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
    towers = planned_load(model, plan, ids_per_bag)
    bare = planned_load(as_passthrough(model), plan, ids_per_bag)
    return compare(
        flat_step(flat_load(model, towers.traffic, ids_per_bag), machine),
        tower_step(bare, machine),
        tower_step(towers, machine),
    )


def compare(flat: StepTime, sptt: StepTime, dmt: StepTime) -> Prediction:
    """Put three steps beside each other."""

    def row(variant: Variant, step: StepTime) -> PredictedStep:
        return PredictedStep(variant=variant, step=step, speedup=flat.total / step.total)

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
