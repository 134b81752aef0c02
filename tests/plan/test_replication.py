"""Which tables are cheaper on every rank: the rule, by MLPerf's tables and by counting bytes."""

from __future__ import annotations

import math

import pytest

from dmt_convert.model import TowerModuleSpec, converted_spec
from dmt_convert.placement import (
    Cluster,
    StepCost,
    advise_replication,
    cheaper_everywhere,
    step_bytes,
)
from dmt_convert.spec import ModelSpec
from support.specs import build_spec, click_spec

# rows and ids per bag of the 26 multi-hot features of MLPerf's DLRM-DCNv2
_BIG = 40_000_000
MLPERF_ROWS = (
    *(_BIG, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, _BIG, 3067956, 405282, 10),
    *(2209, 11938, 155, 4, 976, 14, _BIG, _BIG, _BIG, 590152, 12973, 108, 36),
)
MLPERF_IDS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


@pytest.fixture(scope="module")
def mlperf() -> ModelSpec:
    return build_spec(26, kind="cat", dims=128, rows=MLPERF_ROWS, dense=(13, 128), hidden=(8,))


@pytest.mark.parametrize(
    ("hosts", "batch", "compression", "count", "largest", "before", "after"),
    [
        (2, 256, 1, 9, 976, 29.0, 20.8),
        (2, 1024, 1, 11, 2209, 116.1, 74.2),
        (2, 16384, 1, 18, 39060, 1857, 742),
        (2, 1024, 4, 9, 976, 34.3, 25.7),
        (4, 4096, 4, 11, 2209, 206, 138),
        (16, 1024, 1, 13, 7424, 218, 134),
        (16, 4096, 4, 13, 7424, 257, 169),
    ],
)
def test_tables_of_mlperf_at_break_even(
    mlperf: ModelSpec,
    hosts: int,
    batch: int,
    compression: float,
    count: int,
    largest: int,
    before: float,
    after: float,
) -> None:
    """Against figures that were computed apart from this code, by the same two formulas."""
    cluster = Cluster(hosts=hosts, ranks_per_host=8)
    cost = StepCost(cluster=cluster, batch=batch, compression=compression)
    ids = dict(zip(mlperf.feature_names, map(float, MLPERF_IDS), strict=True))
    chosen = cheaper_everywhere(mlperf, cost, ids, margin=1.0)
    assert (len(chosen), mlperf.table(chosen[-1]).rows) == (count, largest)
    found = [step_bytes(mlperf, cost, tables, ids) / 1e6 for tables in ((), chosen)]
    assert found == pytest.approx([before, after], rel=0.005)
    assert set(cheaper_everywhere(mlperf, cost, ids)) <= set(chosen)


def test_the_rule_takes_what_lowers_the_bytes_and_nothing_else() -> None:
    flat = click_spec(rows=(3000, 700, 40, 9000), dims=(8, 8, 4, 8))
    cost = StepCost(cluster=Cluster(hosts=2, ranks_per_host=2), batch=512, compression=2.0)
    chosen = cheaper_everywhere(flat, cost, margin=1.0)
    assert chosen
    for table in flat.tables:
        other = set(chosen) ^ {table.name}
        assert step_bytes(flat, cost, other) > step_bytes(flat, cost, chosen)


def test_a_table_of_several_features_saves_for_each() -> None:
    names = ("user", "friend", "item")
    flat = build_spec(names, kind="cat", dims=8, rows=(6000, 6000, 6000), dense=(5,), hidden=(8,))
    shared = ModelSpec(
        family=flat.family,
        tables=(flat.tables[0], flat.tables[2]),
        features=(
            flat.features[0],
            type(flat.features[1])(name="friend", table=flat.tables[0].name),
            flat.features[2],
        ),
        dense_arch=flat.dense_arch,
        interaction=flat.interaction,
        over_arch=flat.over_arch,
    )
    cost = StepCost(cluster=Cluster(hosts=4, ranks_per_host=8), batch=512)
    # at break-even: 6000 rows against 0.8 * 8 * 512 * (1 + 1/8) * 0.774 = 2853 for one feature
    assert cheaper_everywhere(shared, cost) == ()
    double = StepCost(cluster=cost.cluster, batch=1024)
    assert cheaper_everywhere(shared, double) == (shared.tables[0].name,)


def test_one_host_has_nothing_to_save() -> None:
    flat = click_spec()
    cost = StepCost(cluster=Cluster(hosts=1, ranks_per_host=8))
    assert cheaper_everywhere(flat, cost) == () and step_bytes(flat, cost) == 0


def test_advice_counts_what_it_says(mlperf: ModelSpec) -> None:
    names, cluster = mlperf.feature_names, Cluster(hosts=4, ranks_per_host=8)
    module = TowerModuleSpec(kind="passthrough")
    towers = [names[t::4] for t in range(4)]
    model = converted_spec(mlperf, towers, module)
    said = advise_replication(model, cluster)
    assert said is not None and said.startswith("11 of 26 tables would be cheaper on every rank")
    cost = StepCost(cluster=cluster)
    factor = step_bytes(mlperf, cost) / step_bytes(mlperf, cost, cheaper_everywhere(mlperf, cost))
    assert f"auto: {factor:.1f} times fewer" in said and math.isclose(factor, 1.6, abs_tol=0.1)
    # what has some already, cannot have any, or would gain nothing is not advised
    some = converted_spec(mlperf, [names[:20]], module, everywhere=[names[20:]])
    assert advise_replication(some, cluster) is None
    mapped = converted_spec(mlperf, towers, TowerModuleSpec(kind="dlrm", c=1, dim=64))
    assert advise_replication(mapped, cluster) is None
    assert advise_replication(model, cluster, batch=1) is None
    single = converted_spec(mlperf, [(name,) for name in names], module)
    assert advise_replication(single, cluster) is None  # no tower would be left without tables
