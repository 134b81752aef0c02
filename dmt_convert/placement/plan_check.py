"""Whether a plan is a plan of this model."""

from __future__ import annotations

from dmt_convert.errors import PlanError
from dmt_convert.placement.packer import measure_ranks, tower_loads
from dmt_convert.placement.tower_plan import TowerPlan, shorten
from dmt_convert.spec import ModelSpec, TowerAssignment


def check_plan(plan: TowerPlan, spec: ModelSpec, assignment: TowerAssignment) -> None:
    """Refuse unless the plan places exactly this model's tables, by these towers.

    That shards tile their table inside their tower's hosts and memory is what every
    `TowerPlan` checks by itself; here it is held against the model.

    Raises:
        PlanError: A table is missing, unknown, of another shape or in another tower, or the
            bytes per rank are not those of these tables; all that is wrong is listed.
    """
    towers = tower_loads(spec, assignment, {})
    loads = {table.name: table for tables in towers for table in tables}
    placed = {placement.table: placement for placement in plan.tables}
    problems = [f"table {name!r} is not placed" for name in loads if name not in placed]
    problems += [f"table {name!r} is not in the model" for name in placed if name not in loads]
    if len(plan.tower_hosts) != len(towers):
        problems.append(f"it places {len(plan.tower_hosts)} towers, the model has {len(towers)}")
    for name in placed.keys() & loads.keys():
        load, placement = loads[name], placed[name]
        if (placement.rows, placement.cols) != (load.rows, load.dim):
            problems.append(
                f"table {name!r} is {placement.rows} x {placement.cols} in the plan, "
                f"{load.rows} x {load.dim} in the model"
            )
        if placement.tower != load.tower:
            problems.append(
                f"table {name!r} is in tower {placement.tower} of the plan, its features in "
                f"tower {load.tower}"
            )
    if not problems:
        sizes, _, _ = measure_ranks(loads, placed, plan.cluster.world_size)
        problems += [
            f"rank {rank} holds {actual} bytes, the plan says {planned}"
            for rank, (actual, planned) in enumerate(zip(sizes, plan.bytes_per_rank, strict=True))
            if actual != planned
        ]
    if problems:
        raise PlanError(
            f"the plan is not of this model: {len(problems)} problem(s)",
            expected="every table of the model once, in the tower of its features",
            hint="make the plan anew with `dmt plan`",
            details=shorten(sorted(problems)),
        )
