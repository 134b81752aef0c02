"""Whether a plan is of a model, and what its ranks hold in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dmt_convert.documents import shorten
from dmt_convert.errors import PlanError
from dmt_convert.model import DmtSpec
from dmt_convert.placement.packing import TableLoad, measure_ranks, tower_loads
from dmt_convert.placement.table_memory import TableOptimizer
from dmt_convert.placement.tower_plan import TablePlacement, TowerPlan
from dmt_convert.spec import DTYPE_BYTES, ModelSpec, TowerAssignment


def check_plan(plan: TowerPlan, spec: ModelSpec, assignment: TowerAssignment) -> None:
    """Refuse unless the plan places exactly this model's tables, by these towers.

    Every `TowerPlan` has already checked that shards tile their table, inside their tower's hosts
    and memory. This compares it with the model.

    Raises:
        PlanError: A table is missing, unknown, of another shape or in another tower, or the
            bytes per rank are not those of these tables; all that is wrong is listed.
    """
    towers = tower_loads(spec, assignment, {}, optimizer=plan.optimizer)
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
        problems += _size_problems(plan, spec, loads, placed)
    if problems:
        raise PlanError(
            f"the plan does not fit this model: {len(problems)} problem(s)",
            expected="every table of the model once, in the tower of its features",
            hint="make the plan again with `dmt plan`",
            details=shorten(sorted(problems)),
        )


def _size_problems(
    plan: TowerPlan,
    spec: ModelSpec,
    loads: Mapping[str, TableLoad],
    placed: Mapping[str, TablePlacement],
) -> list[str]:
    """Compare the bytes of every rank; earlier versions counted fp16 tables with two bytes."""
    sizes = rank_bytes(plan, loads, placed)
    stored = {
        name: replace(load, element_bytes=DTYPE_BYTES[spec.table(name).dtype])
        for name, load in loads.items()
    }
    if plan.bytes_per_rank == rank_bytes(plan, stored, placed):
        return []
    return [
        f"rank {rank} holds {actual} bytes, the plan says {planned}"
        for rank, (actual, planned) in enumerate(zip(sizes, plan.bytes_per_rank, strict=True))
        if actual != planned
    ]


def rank_bytes(
    plan: TowerPlan, loads: Mapping[str, TableLoad], placed: Mapping[str, TablePlacement]
) -> tuple[int, ...]:
    """Return what every rank holds, copies of tables on all ranks included, in bytes."""
    sizes, _, _ = measure_ranks(loads, placed, plan.cluster.world_size)
    held = sum(loads[name].everywhere_bytes for name in placed if placed[name].is_everywhere)
    return tuple(size + held for size in sizes)


def training_bytes(plan: TowerPlan, model: DmtSpec, optimizer: TableOptimizer) -> tuple[int, ...]:
    """Return what training allocates for tables on every rank of a plan, in bytes.

    Args:
        plan: Where they lie.
        model: What is trained.
        optimizer: What moves the tables, whatever the plan was made for.
    """
    towers = tower_loads(model.flat, model.assignment, {}, optimizer=optimizer)
    loads = {table.name: table for tables in towers for table in tables}
    return rank_bytes(plan, loads, {placement.table: placement for placement in plan.tables})


def describe_cached(plan: TowerPlan) -> str | None:
    """Say in a line which tables lie in host memory, and what of them ranks keep; None: none."""
    moved = [table for table in plan.tables if table.cached is not None]
    if not moved:
        return None
    shares = sorted({table.cached for table in moved if table.cached is not None})
    kept = " to ".join(f"{share:.3g}" for share in dict.fromkeys((shares[0], shares[-1])))
    return (
        f"{len(moved)} of {len(plan.tables)} tables, too large for their ranks "
        f"(TorchRec's fused_uvm_caching): a share of {kept} of their rows is kept on the ranks"
    )
