"""A plan that is wrong cannot be made, read, or passed off as another model's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dmt_convert.errors import PlanError
from dmt_convert.placement import Cluster, TowerPlan, check_plan, plan_towers
from dmt_convert.placement.table_memory import shard_bytes
from dmt_convert.spec import ModelSpec, TowerAssignment
from support.specs import spec_of_towers


@pytest.fixture
def model() -> tuple[ModelSpec, TowerAssignment]:
    return spec_of_towers([[(600, 64), (10, 8)], [(1100, 20), (3, 4)]])


@pytest.fixture
def plan(model: tuple[ModelSpec, TowerAssignment]) -> TowerPlan:
    """Table 0 in columns, table 2 in rows, the others whole."""
    cluster = Cluster(hosts=2, ranks_per_host=2, hbm_bytes=100_000)
    return plan_towers(*model, cluster, tower_bytes=[288, 96])


def replace_shard(plan: TowerPlan, table: int, shard: int, **changes: int) -> TowerPlan:
    placement = plan.tables[table]
    shards = list(placement.shards)
    shards[shard] = replace(shards[shard], **changes)
    tables = list(plan.tables)
    tables[table] = replace(placement, shards=tuple(shards))
    return replace(plan, tables=tuple(tables))


def replace_table(plan: TowerPlan, table: int, **changes: Any) -> TowerPlan:
    tables = list(plan.tables)
    tables[table] = replace(tables[table], **changes)
    return replace(plan, tables=tuple(tables))


SABOTAGE: dict[str, tuple[Callable[[TowerPlan], TowerPlan], str]] = {
    "shard moved along its table": (
        lambda p: replace_shard(p, 0, 1, col_offset=28),
        "do not tile",
    ),
    "shard too narrow": (lambda p: replace_shard(p, 0, 1, cols=28), "do not tile"),
    "rows overlap": (lambda p: replace_shard(p, 2, 1, row_offset=549), "do not tile"),
    "shard moved to the other host": (lambda p: replace_shard(p, 1, 0, rank=2), "outside"),
    "shard on a rank that does not exist": (lambda p: replace_shard(p, 1, 0, rank=9), "outside"),
    "column shards on one rank": (lambda p: replace_shard(p, 0, 1, rank=0), "two shards on one"),
    "row shards in another order": (
        lambda p: replace_shard(replace_shard_pair(p), 2, 1, rank=2),
        "in order",
    ),
    "table placed twice": (lambda p: replace(p, tables=(*p.tables, p.tables[0])), "twice"),
    "tower without a table": (lambda p: replace(p, tables=p.tables[:2]), "tower 1 has no table"),
    "towers swapped between hosts": (
        lambda p: replace(p, tower_hosts=p.tower_hosts[::-1]),
        "outside",
    ),
    "host without a tower": (
        lambda p: replace(p, tower_hosts=((0,), (0,))),
        r"hosts \[1\] have no tower",
    ),
    "host that does not exist": (lambda p: replace(p, tower_hosts=((0,), (2,))), "tower 1 is on"),
    "no towers": (lambda p: replace(p, tower_hosts=()), "no towers"),
    "tower that does not exist": (lambda p: replace_table(p, 1, tower=5), "in tower 5 of 2"),
    "no shards": (lambda p: replace_table(p, 1, shards=()), "no shards"),
    "too few ranks": (
        lambda p: replace(p, bytes_per_rank=p.bytes_per_rank[:3]),
        "3 entries for 4 ranks",
    ),
    "too much memory": (
        lambda p: replace(p, bytes_per_rank=(90_000, *p.bytes_per_rank[1:])),
        "rank 0 holds 87.89 KiB of 83.01 KiB",
    ),
}


def replace_shard_pair(plan: TowerPlan) -> TowerPlan:
    """Put both row shards on swapped ranks at once."""
    shards = plan.tables[2].shards
    swapped = (replace(shards[0], rank=3), replace(shards[1], rank=2))
    return replace_table(plan, 2, shards=swapped)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_plan_cannot_be_made(plan: TowerPlan, name: str) -> None:
    sabotage, message = SABOTAGE[name]
    with pytest.raises(PlanError, match=message):
        sabotage(plan)


def test_a_plan_of_its_model_passes(
    plan: TowerPlan, model: tuple[ModelSpec, TowerAssignment]
) -> None:
    check_plan(plan, *model)


def test_a_dropped_table_is_noticed(
    plan: TowerPlan, model: tuple[ModelSpec, TowerAssignment]
) -> None:
    with pytest.raises(PlanError, match="table 't1' is not placed"):
        check_plan(replace(plan, tables=plan.tables[:1] + plan.tables[2:]), *model)


def test_a_table_of_another_shape_is_noticed(
    plan: TowerPlan, model: tuple[ModelSpec, TowerAssignment]
) -> None:
    with pytest.raises(PlanError, match="9 x 8 in the plan, 10 x 8 in the model"):
        check_plan(replace_shard(plan, 1, 0, rows=9), *model)


def test_forged_bytes_are_noticed(
    plan: TowerPlan, model: tuple[ModelSpec, TowerAssignment]
) -> None:
    forged = replace(plan, bytes_per_rank=(0, *plan.bytes_per_rank[1:]))
    with pytest.raises(PlanError, match="rank 0 holds 79560 bytes, the plan says 0"):
        check_plan(forged, *model)


def test_a_plan_of_other_towers_is_refused_with_all_differences(plan: TowerPlan) -> None:
    other = spec_of_towers([[(600, 64)], [(10, 8)], [(1100, 20), (3, 4), (5, 4)]])
    with pytest.raises(PlanError) as error:
        check_plan(plan, *other)
    assert error.value.details == (
        "it places 2 towers, the model has 3",
        "table 't1' is in tower 0 of the plan, its features in tower 1",
        "table 't2' is in tower 1 of the plan, its features in tower 2",
        "table 't3' is in tower 1 of the plan, its features in tower 2",
        "table 't4' is not placed",
    )


def test_a_plan_round_trips_through_text(plan: TowerPlan) -> None:
    text = json.dumps(plan.to_json())
    again = TowerPlan.from_json(json.loads(text))
    assert again == plan
    assert json.dumps(again.to_json()) == text


def test_the_json_states_what_a_reader_looks_for(plan: TowerPlan) -> None:
    value = plan.to_json()
    assert value["schema_version"] == 1
    assert value["optimizer"] == "rowwise_adagrad"
    assert value["tower_order"] == [0, 1]
    assert sum(value["bytes_per_host"]) == sum(value["bytes_per_rank"])


@pytest.mark.parametrize("value", [None, 3, "plan", [], {}, {"schema_version": "1"}])
def test_what_is_no_plan_is_refused(value: object) -> None:
    with pytest.raises(PlanError, match="the plan cannot be read"):
        TowerPlan.from_json(value)


def test_a_later_version_is_refused(plan: TowerPlan) -> None:
    with pytest.raises(PlanError, match="schema version 2"):
        TowerPlan.from_json(plan.to_json() | {"schema_version": 2})


def test_all_problems_of_a_file_are_listed_at_once(plan: TowerPlan) -> None:
    value = json.loads(json.dumps(plan.to_json()))
    value["tables"][1]["shards"][0]["rank"] = "0"
    value["tables"][2]["sharding_type"] = "row_wise"
    value["cluster"]["hosts"] = -1
    value["traffic"]["flat_indices"]["cross_bytes"] = float("nan")
    value["tables"][0]["compute_kernel"] = "uvm"
    del value["tower_hosts"]
    with pytest.raises(PlanError) as error:
        TowerPlan.from_json(value)
    assert error.value.details == (
        "cluster.hosts is -1, not greater than 0",
        "tower_hosts is missing",
        "tables[0].compute_kernel is \"uvm\", not 'fused', 'fused_uvm_caching' or 'dense'",
        'tables[1].shards[0].rank is "0", not a valid integer',
        "tables[2].sharding_type is \"row_wise\", not 'table_row_wise', 'table_column_wise' or "
        "'data_parallel'",
        "traffic.flat_indices.cross_bytes is NaN, not a finite number",
    )


def test_keys_of_later_versions_are_ignored(plan: TowerPlan) -> None:
    value = plan.to_json() | {"extra": 1}
    value["cluster"] |= {"extra": 2}
    assert TowerPlan.from_json(value) == plan


@pytest.mark.parametrize("name", ["tower_order", "bytes_per_host"])
def test_a_file_that_contradicts_itself_is_refused(plan: TowerPlan, name: str) -> None:
    value = plan.to_json()
    value[name] = value[name][::-1]
    with pytest.raises(PlanError) as error:
        TowerPlan.from_json(value)
    assert error.value.details[0].startswith(name)


def test_any_single_wrong_value_is_refused_and_never_crashes(plan: TowerPlan) -> None:
    """Replace every value in the file, one at a time, by nonsense."""
    whole = json.loads(json.dumps(plan.to_json()))
    refused = 0
    for path in list(paths(whole)):
        for nonsense in (None, "x", -1, {}, [[]], True):
            value = copy.deepcopy(whole)
            parent: Any = value
            for key in path[:-1]:
                parent = parent[key]
            if parent[path[-1]] == nonsense or (path[-1] == "table" and nonsense == "x"):
                continue
            parent[path[-1]] = nonsense
            with pytest.raises(PlanError):
                TowerPlan.from_json(value)
            refused += 1
    assert refused > 500


def paths(value: object, prefix: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    for key, item in items:
        yield (*prefix, key)
        if isinstance(item, dict | list):
            yield from paths(item, (*prefix, key))


def test_shard_bytes_count_a_state_per_row_of_every_shard() -> None:
    assert shard_bytes(10, 32) == 10 * 32 * 4 + 10 * 4
    assert shard_bytes(10, 32, element_bytes=2) == 10 * 32 * 2 + 10 * 4
    assert shard_bytes(0, 32, cached=0.5) == 0
