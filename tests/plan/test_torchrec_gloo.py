"""Four gloo processes, two hosts of two ranks: TorchRec takes the plan and looks up the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmt_convert.placement import Cluster, TowerPlan, plan_towers
from dmt_convert.spec import ModelSpec, TowerAssignment
from support.cluster.client import RunRanks, serve_ranks
from support.specs import spec_of_towers

pytest.importorskip("torchrec", reason="shards real towers, which needs torchrec")


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[RunRanks]:
    with serve_ranks("lookup_scenarios") as run:
        yield run


def compare_lookups(
    run_ranks: RunRanks,
    plan: TowerPlan,
    spec: ModelSpec,
    assignment: TowerAssignment,
    **environ: str,
) -> list[str]:
    """Run a process per rank; return the verdicts with the plan's tower order and without."""
    job = {"ranks_per_host": plan.cluster.ranks_per_host, "environ": environ, "seconds": 240}
    case = {"spec": spec.to_json(), "towers": assignment.towers, "plan": plan.to_json()}
    reports = run_ranks(plan.cluster.world_size, "compare_lookups", job=job, **case)
    verdicts: list[str] = reports[0]["result"]
    return verdicts


@pytest.mark.slow
def test_sharded_towers_look_up_what_unsharded_ones_do(run_ranks: RunRanks) -> None:
    """All ways of sharding at once, and towers out of host order, told and not told."""
    spec, assignment = spec_of_towers(
        [
            [(600, 64)],
            [(1100, 20)],
            [(10, 8), (40, 16), (12, 8)],
            [(30, 16), (3, 4), (9, 8)],
        ],
        shared=[3],
    )
    cluster = Cluster(hosts=2, ranks_per_host=2, hbm_bytes=100_000)
    widths = [sum(spec.table_of(f).dim for f in tower) for tower in assignment.towers]
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[4 * width for width in widths])
    kinds = {(table.sharding_type, len(table.shards)) for table in plan.tables}
    assert kinds == {("table_row_wise", 2), ("table_column_wise", 1), ("table_column_wise", 2)}
    assert plan.tower_order != (0, 1, 2, 3)
    assert compare_lookups(run_ranks, plan, spec, assignment) == ["same", "permuted"]


@pytest.mark.slow
def test_a_tower_over_two_hosts_looks_up_what_an_unsharded_one_does(run_ranks: RunRanks) -> None:
    spec, assignment = spec_of_towers([[(40, 16), (9, 8)], [(30, 64)]])
    cluster = Cluster(hosts=4, ranks_per_host=1, hbm_bytes=8_000)
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[96, 256])
    assert plan.tower_hosts == ((0, 1), (2, 3))
    assert len(plan.tables[2].shards) == 2
    verdicts = compare_lookups(run_ranks, plan, spec, assignment, TORCHREC_RESOLVED_POD_SIZE="2")
    assert verdicts == ["same", "same"]
