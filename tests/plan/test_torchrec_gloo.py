"""Four gloo processes, two hosts of two ranks: TorchRec takes the plan and looks up the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmt_convert.placement import Cluster, TowerPlan, plan_towers
from dmt_convert.spec import ModelSpec, TowerAssignment

from .conftest import MakeModel

ROOT = Path(__file__).parents[2]

pytest.importorskip("torchrec", reason="shards real towers, which needs torchrec")


def run_ranks(
    plan: TowerPlan, spec: ModelSpec, assignment: TowerAssignment, folder: Path, **environ: str
) -> list[str]:
    """Run a process per rank; return the verdicts with the plan's tower order and without."""
    case = {"spec": spec.to_json(), "towers": assignment.towers, "plan": plan.to_json()}
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    size = plan.cluster.ranks_per_host
    script = str(Path(__file__).with_name("gloo_worker.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(path), str(rank), str(folder / "init")],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
            | {"LOCAL_RANK": str(rank % size), "GLOO_SOCKET_IFNAME": "lo"}
            | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(plan.cluster.world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors[-4000:]
    return outputs[0][0].split()


@pytest.mark.slow
def test_sharded_towers_look_up_what_unsharded_ones_do(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """All ways of sharding at once, and towers out of host order, told and not told."""
    spec, assignment = make_model(
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
    plan = plan_towers(spec, assignment, cluster, tower_widths=widths)
    kinds = {(table.sharding_type, len(table.shards)) for table in plan.tables}
    assert kinds == {("table_row_wise", 2), ("table_column_wise", 1), ("table_column_wise", 2)}
    assert plan.tower_order != (0, 1, 2, 3)
    assert run_ranks(plan, spec, assignment, tmp_path) == ["same", "permuted"]


@pytest.mark.slow
def test_a_tower_over_two_hosts_looks_up_what_an_unsharded_one_does(
    make_model: MakeModel, tmp_path: Path
) -> None:
    spec, assignment = make_model([[(40, 16), (9, 8)], [(30, 64)]])
    cluster = Cluster(hosts=4, ranks_per_host=1, hbm_bytes=8_000)
    plan = plan_towers(spec, assignment, cluster, tower_widths=[24, 64])
    assert plan.tower_hosts == ((0, 1), (2, 3))
    assert len(plan.tables[2].shards) == 2
    verdicts = run_ranks(plan, spec, assignment, tmp_path, TORCHREC_RESOLVED_POD_SIZE="2")
    assert verdicts == ["same", "same"]
