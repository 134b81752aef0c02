"""What the packer decides, and what it refuses with which numbers."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt_convert.errors import PartitionError, PlanError
from dmt_convert.placement import GIB, Cluster, TowerPlan, check_plan, default_cluster, plan_towers
from dmt_convert.placement.packing import column_cuts, spread_towers
from dmt_convert.placement.tower_plan import row_blocks
from dmt_convert.spec import ModelSpec, TowerAssignment
from support.specs import spec_of_towers


def plan_for(
    model: tuple[ModelSpec, TowerAssignment], hosts: int, ranks: int, hbm_bytes: int = GIB
) -> TowerPlan:
    spec, assignment = model
    widths = [8 * len(tower) for tower in assignment.towers]
    cluster = Cluster(hosts=hosts, ranks_per_host=ranks, hbm_bytes=hbm_bytes)
    return plan_towers(spec, assignment, cluster, tower_bytes=[4 * width for width in widths])


def assert_sound(plan: TowerPlan, spec: ModelSpec, assignment: TowerAssignment) -> None:
    """Say again, element by element, what a plan promises."""
    shapes = {table.name: (table.rows, table.dim) for table in spec.tables}
    assert [placement.table for placement in plan.tables] == list(shapes)
    used = [0] * plan.cluster.world_size
    for placement in plan.tables:
        cover = np.zeros(shapes[placement.table], dtype=np.int8)
        features = {f.name for f in spec.features if f.table == placement.table}
        assert features <= set(assignment.towers[placement.tower])
        hosts = set(plan.tower_hosts[placement.tower])
        for shard in placement.shards:
            rows = slice(shard.row_offset, shard.row_offset + shard.rows)
            cover[rows, shard.col_offset : shard.col_offset + shard.cols] += 1
            assert shard.rank // plan.cluster.ranks_per_host in hosts
            columns = -(-shard.cols // 4) * 4  # as many as the kernels take
            if placement.cached is None:
                used[shard.rank] += shard.rows * (columns * 4 + 4)
            elif shard.rows:
                kept = int(shard.rows * placement.cached) + 1
                used[shard.rank] += kept * (columns * 4 + 16) + shard.rows * 4
        assert (cover == 1).all()
    assert tuple(used) == plan.bytes_per_rank
    assert max(used) <= plan.cluster.hbm_bytes * 0.85
    assert sum(plan.bytes_per_host) == sum(used)


shapes = st.tuples(st.integers(1, 400), st.sampled_from([4, 6, 16, 64, 96, 128]))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    towers=st.lists(st.lists(shapes, min_size=1, max_size=5), min_size=1, max_size=6),
    hosts=st.integers(1, 6),
    ranks=st.integers(1, 4),
    hbm_kib=st.sampled_from([60, 150, 10_000]),
    shared=st.sets(st.integers(0, 5)),
)
def test_every_plan_is_sound_and_round_trips(
    towers: list[list[tuple[int, int]]], hosts: int, ranks: int, hbm_kib: int, shared: set[int]
) -> None:
    spec, assignment = spec_of_towers(towers, shared=list(shared))
    try:
        plan = plan_for((spec, assignment), hosts, ranks, hbm_kib * 1024)
    except PlanError as error:
        # A refusal must be true: the hosts do not divide, or a host cannot hold its part.
        if "groups of hosts" not in error.found:
            assert len(towers) < hosts
            assert hosts % len(towers)
        else:
            assert hbm_kib < 10_000
        return
    assert_sound(plan, spec, assignment)
    check_plan(plan, spec, assignment)
    assert TowerPlan.from_json(plan.to_json()) == plan
    assert {host for hosts in plan.tower_hosts for host in hosts} == set(range(hosts))
    assert sorted(plan.tower_order) == list(range(len(towers)))


def test_with_a_host_per_tower_tower_t_is_on_host_t() -> None:
    plan = plan_for(spec_of_towers([[(10, 8)], [(900, 64)], [(5, 4)]]), 3, 2)
    assert plan.tower_hosts == ((0,), (1,), (2,))
    assert plan.tower_order == (0, 1, 2)


def test_fewer_towers_than_hosts_take_consecutive_hosts() -> None:
    plan = plan_for(spec_of_towers([[(10, 8)] * 6, [(10, 8)] * 6]), 6, 1)
    assert plan.tower_hosts == ((0, 1, 2), (3, 4, 5))
    assert plan.hosts_per_tower == 3
    assert list(plan.ranks_of(1)) == [3, 4, 5]
    assert plan.lookups_per_rank == (2.0,) * 6


def test_more_towers_than_hosts_share_evenly_in_order() -> None:
    plan = plan_for(spec_of_towers([[(100, 8)] * 2] * 6), 3, 2)
    assert plan.tower_hosts == ((0,), (0,), (1,), (1,), (2,), (2,))
    assert len(set(plan.bytes_per_host)) == 1


def test_towers_leave_their_order_where_that_evens_the_hosts() -> None:
    """In a row: 4 + 4 lookups against 1 + 1; mixed: 4 + 1 each."""
    big, small = [(100, 8)] * 4, [(100, 8)]
    plan = plan_for(spec_of_towers([big, big, small, small, small]), 2, 1)
    assert plan.bytes_per_host[0] * 0.8 < plan.bytes_per_host[1] < plan.bytes_per_host[0] * 1.25
    assert plan.tower_hosts[0] != plan.tower_hosts[1]
    assert plan.tower_order == tuple(sorted(range(5), key=lambda t: plan.tower_hosts[t]))
    assert plan.tower_order != (0, 1, 2, 3, 4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    loads=st.lists(
        st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99)),
        min_size=1,
        max_size=7,
    ),
    hosts=st.integers(1, 4),
)
def test_spread_towers_stays_near_the_best_possible(
    loads: list[tuple[int, int, int]], hosts: int
) -> None:
    """Against all placements: no host has over twice the best peak, and none is empty."""
    if hosts > len(loads):
        return
    array = np.array(loads, dtype=np.float64)

    def peak(host_of: tuple[int, ...]) -> float:
        used = np.zeros((hosts, 3))
        np.add.at(used, np.array(host_of), array)
        return float((used / array.mean(axis=0)).max())

    found = spread_towers(array, hosts, np.inf)
    assert set(found) == set(range(hosts))
    best = min(peak(h) for h in itertools.product(range(hosts), repeat=len(loads)))
    assert peak(found) <= 2 * best


def test_tables_stay_whole_and_spread_over_the_ranks() -> None:
    plan = plan_for(spec_of_towers([[(100, 64)] * 8]), 1, 4)
    assert all(len(table.shards) == 1 for table in plan.tables)
    assert len(set(plan.bytes_per_rank)) == 1
    assert plan.lookups_per_rank == (2.0,) * 4


def test_a_table_too_large_for_a_rank_is_cut_into_columns() -> None:
    """1000 x (128 * 4 + 4) = 516 kB in 340 kB ranks: two halves of 260 kB."""
    plan = plan_for(spec_of_towers([[(1000, 128), *[(200, 128)] * 5]]), 1, 4, 400_000)
    table = plan.tables[0]
    assert table.sharding_type == "table_column_wise"
    assert [(shard.col_offset, shard.cols) for shard in table.shards] == [(0, 64), (64, 64)]
    assert sum(plan.bytes_per_rank) == 1000 * (128 * 4 + 2 * 4) + 1000 * (128 * 4 + 4)


def test_a_table_that_dominates_its_host_is_cut_though_it_fits() -> None:
    model = spec_of_towers([[(1000, 128), *[(10, 128)] * 7]])
    assert len(plan_for(model, 1, 4, 2_000_000).tables[0].shards) == 2
    assert len(plan_for(model, 1, 4, 200_000_000).tables[0].shards) == 1


def test_a_table_that_columns_do_not_help_is_cut_into_rows() -> None:
    """Width 16 is below two shards of 32, so only rows are left."""
    plan = plan_for(spec_of_towers([[(1001, 16)]]), 1, 4, 25_000)
    (table,) = plan.tables
    assert table.sharding_type == "table_row_wise"
    assert [shard.rows for shard in table.shards] == [251, 251, 251, 248]


def test_rows_are_cut_as_torchrec_computes_the_rank_of_a_row() -> None:
    assert row_blocks(10, 4) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert row_blocks(5, 4) == [(0, 2), (2, 2), (4, 1), (5, 0)]
    assert row_blocks(1, 3) == [(0, 1), (1, 0), (1, 0)]


def test_column_cuts_are_even_wide_and_multiples_of_four() -> None:
    assert column_cuts(128, 8) == [1, 2, 4]
    assert column_cuts(256, 4) == [1, 2, 4]
    assert column_cuts(96, 8) == [1, 2, 3]
    assert column_cuts(16, 8) == [1]
    assert column_cuts(70, 8) == [1]


def test_gaps_between_whole_tables_are_filled() -> None:
    """Three tables of 6.8 kB on two ranks of 10.2 kB fit only if one is cut."""
    plan = plan_for(spec_of_towers([[(100, 16)] * 3]), 1, 2, 12_100)
    assert [table.sharding_type for table in plan.tables].count("table_row_wise") >= 1
    assert max(plan.bytes_per_rank) <= plan.cluster.usable_bytes


def test_known_pooling_balances_lookups() -> None:
    """Of four like tables, taken in turn, the two with many ids would share a rank."""
    spec, assignment = spec_of_towers([[(100, 8)] * 4])
    cluster = Cluster(hosts=1, ranks_per_host=2)
    ids = {"f0": 3.0, "f2": 3.0}
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[128], ids_per_bag=ids)
    assert plan.lookups_per_rank == (4.0, 4.0)
    blind = plan_towers(spec, assignment, cluster, tower_bytes=[128])
    assert [table.shards[0].rank for table in blind.tables] == [0, 1, 0, 1]


def test_the_same_input_gives_the_same_plan() -> None:
    model = spec_of_towers([[(i * 7 % 90 + 1, 16) for i in range(20)] for _ in range(5)])
    assert plan_for(model, 2, 3) == plan_for(model, 2, 3)


def test_a_tower_larger_than_its_host_is_refused_with_the_numbers() -> None:
    model = spec_of_towers([[(10, 8)], [(4_000_000, 128)]])
    with pytest.raises(PlanError) as error:
        plan_for(model, 2, 2, GIB // 8)
    text = str(error.value)
    assert "take 1.92 GiB, and 1 of 2 groups" in text
    assert "tower 1 on host 1: 1.92 GiB for 217.60 MiB, largest table 't1' of 1.92 GiB" in text
    assert "(2 ranks of 128.00 MiB, 15% kept for all but tables)" in text
    assert "use 20 hosts or more, or fewer" in text
    # What the hint says is enough, without host memory: 20 hosts, ten per tower.
    plan = plan_for(model, 20, 2, GIB // 8)
    assert plan.hosts_per_tower == 10
    assert all(table.cached is None for table in plan.tables)


def test_hosts_that_the_towers_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match="2 towers on 5 hosts") as error:
        plan_for(spec_of_towers([[(10, 8)], [(10, 8)]]), 5, 1)
    assert error.value.hint == "use 4 or 6 hosts, or --towers 5"


def test_a_table_shared_by_two_towers_is_refused() -> None:
    spec, _ = spec_of_towers([[(10, 8), (20, 8)]], shared=[1])
    split = TowerAssignment(towers=(("f0", "f1"), ("g1",)))
    with pytest.raises(PlanError) as error:
        plan_towers(spec, split, default_cluster(2), tower_bytes=[32, 32])
    assert error.value.details == ("t1: f1 in tower 0, g1 in tower 1",)
    assert "--together f1,g1" in error.value.hint


@pytest.mark.parametrize("widths", [[8], [8, 8, 8], [8, 0]])
def test_bytes_that_do_not_match_the_towers_are_refused(widths: list[int]) -> None:
    spec, assignment = spec_of_towers([[(10, 8)], [(10, 8)]])
    with pytest.raises(PlanError, match="bytes per sample"):
        plan_towers(
            spec, assignment, default_cluster(2), tower_bytes=[4 * width for width in widths]
        )


@pytest.mark.parametrize("ids", [{"f0": 0.0}, {"f0": float("nan")}, {"nobody": 1.0}])
def test_impossible_id_counts_are_refused(ids: dict[str, float]) -> None:
    spec, assignment = spec_of_towers([[(10, 8)]])
    with pytest.raises(PlanError, match="ids per bag"):
        plan_towers(spec, assignment, default_cluster(1), tower_bytes=[32], ids_per_bag=ids)


def test_towers_of_another_model_are_refused() -> None:
    spec, _ = spec_of_towers([[(10, 8)], [(10, 8)]])
    other = TowerAssignment(towers=(("f0",),))
    with pytest.raises(PartitionError, match="do not hold"):
        plan_towers(spec, other, default_cluster(1), tower_bytes=[32])


@pytest.mark.parametrize(("num_tables", "towers", "hosts"), [(1000, 16, 16), (5000, 64, 16)])
def test_thousands_of_tables_take_under_five_seconds(
    num_tables: int, towers: int, hosts: int
) -> None:
    shapes = [(10 + i * i * 7919 % 1_000_000, 128) for i in range(num_tables)]
    model = spec_of_towers([shapes[t::towers] for t in range(towers)])
    start = time.process_time()  # not the clock: other processes may be busy
    plan = plan_for(model, hosts, 8, 80 * GIB)
    assert time.process_time() - start < 5
    mean = sum(plan.lookups_per_rank) / len(plan.lookups_per_rank)
    assert max(plan.lookups_per_rank) <= 1.6 * mean


def test_planning_does_not_import_torch() -> None:
    code = "import sys, dmt_convert.placement; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_lookups_are_spread_where_bytes_are_few() -> None:
    """One table holds nearly all bytes of a small model: the others do not shun its rank."""
    spec, assignment = spec_of_towers([[(10_000, 16), *[(10, 16)] * 5]])
    cluster = Cluster(hosts=1, ranks_per_host=2, hbm_bytes=2**30)
    plan = plan_towers(spec, assignment, cluster, tower_bytes=[384])
    assert plan.lookups_per_rank == (3.0, 3.0)
