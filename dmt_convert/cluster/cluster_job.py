"""What is to be trained over many ranks, and where its towers go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dmt_convert.bundle import Bundle
from dmt_convert.cluster.ranks import RankLayout
from dmt_convert.errors import PlanError
from dmt_convert.placement import TowerPlan, plan_towers
from dmt_convert.training import Evaluation, FinetuneConfig, TrainingData


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """What is to be trained, on what, where."""

    bundle: Bundle
    """What training starts from."""
    plan: TowerPlan
    """Where its towers go."""
    data: TrainingData
    """Rows to train on and to measure on."""
    config: FinetuneConfig
    """Settings."""
    layout: RankLayout
    """This rank."""
    out: Path
    """Where the new bundle goes."""
    checkpoints: Path
    """Folder of the training checkpoints; all hosts reach it."""
    timeout_seconds: float
    """How long a rank waits for the slowest one to write a checkpoint."""
    resume: bool = False
    """Go on from the newest whole checkpoint, where there is one."""
    force: bool = False
    """Replace a bundle that is there, and remove checkpoints unless they are gone on from."""


@dataclass(slots=True, kw_only=True)
class Listeners:
    """Who is told how training goes."""

    on_step: Callable[[int, float], None] = lambda step, loss: None
    """Step, from 1, and this rank's loss."""
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None
    """Every evaluation."""
    on_start: Callable[[int], None] = lambda step: None
    """The step at which training starts; above 0 where it goes on from a checkpoint."""


def choose_plan(bundle: Bundle, layout: RankLayout, given: TowerPlan | None) -> TowerPlan:
    """Choose where the towers go: the plan of the bundle, if it is of this cluster, or a new one.

    Args:
        bundle: What is trained.
        layout: The ranks that are there.
        given: The plan that was asked for, if any.

    Raises:
        PlanError: The plan that was asked for is of another cluster, or the towers cannot be
            placed on this one.
    """
    plan = bundle.plan if given is None else given
    found = (layout.hosts, layout.ranks_per_host)
    wanted = (plan.cluster.hosts, plan.cluster.ranks_per_host)
    if found == wanted:
        return plan
    if given is not None:
        raise PlanError(
            f"a plan for {wanted[0]} hosts x {wanted[1]} ranks, on {found[0]} hosts x "
            f"{found[1]} ranks",
            expected="as many hosts and ranks per host as torchrun starts",
            hint=f"make one with `dmt plan BUNDLE --hosts {found[0]} --ranks-per-host {found[1]}`, "
            "or leave the plan out",
        )
    model = bundle.manifest.model
    cluster = replace(plan.cluster, hosts=found[0], ranks_per_host=found[1])
    return plan_towers(model.flat, model.assignment, cluster, tower_widths=model.tower_widths)
