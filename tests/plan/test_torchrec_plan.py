"""TorchRec's plan against TorchRec's own modules, without processes (see also the gloo test)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dmt_convert.errors import PlanError
from dmt_convert.placement import Cluster, TowerPlan, plan_towers
from dmt_convert.spec import FeatureSpec, ModelSpec, TowerAssignment
from support.specs import spec_of_towers

torch = pytest.importorskip("torch", reason="turns plans into TorchRec's, which needs torch")
pytest.importorskip("torchrec", reason="turns plans into TorchRec's, which needs torchrec")

from dmt_convert.placement.torchrec_plan import (  # noqa: E402
    build_tower_collection,
    check_sharding_plan,
    to_sharding_plan,
)

Model = tuple[ModelSpec, TowerAssignment]


@pytest.fixture(scope="module")
def model() -> Model:
    """Towers that leave their order; a table in columns (t0), in rows (t1), shared (t3)."""
    return spec_of_towers(
        [
            [(600, 64)],
            [(1100, 20)],
            [(10, 8), (40, 16), (12, 8)],
            [(30, 16), (3, 4), (9, 8)],
        ],
        shared=[3],
    )


@pytest.fixture(scope="module")
def plan(model: Model) -> TowerPlan:
    cluster = Cluster(hosts=2, ranks_per_host=2, hbm_bytes=100_000)
    return plan_towers(*model, cluster, tower_bytes=[256, 80, 192, 112])


def test_the_sharding_plan_says_what_the_tower_plan_says(plan: TowerPlan, model: Model) -> None:
    sharding_plan = to_sharding_plan(plan, *model, module_path="sparse_arch")
    assert list(sharding_plan.plan) == ["sparse_arch"]
    shardings: Any = sharding_plan.plan["sparse_arch"]
    assert list(shardings) == [table.name for table in model[0].tables]
    sharding = shardings["t1"]
    assert sharding.sharding_type == "table_row_wise"
    assert sharding.compute_kernel == "fused"
    assert sharding.ranks == [2, 3]
    shards = sharding.sharding_spec.shards
    assert [str(shard.placement) for shard in shards] == ["rank:2/cuda:0", "rank:3/cuda:1"]
    assert [shard.shard_offsets for shard in shards] == [[0, 0], [550, 0]]
    assert [shard.shard_sizes for shard in shards] == [[550, 20], [550, 20]]


def test_on_cpu_the_placements_have_no_index(plan: TowerPlan, model: Model) -> None:
    shardings: Any = to_sharding_plan(plan, *model, device="cpu").plan[""]
    assert str(shardings["t1"].sharding_spec.shards[1].placement) == "rank:3/cpu"


def test_torchrec_may_spoil_its_plan_without_spoiling_the_next(
    plan: TowerPlan, model: Model
) -> None:
    first: Any = to_sharding_plan(plan, *model)
    first.plan[""]["t0"].ranks[0] = 99
    check_sharding_plan(to_sharding_plan(plan, *model), collection_of(plan, model), plan=plan)


def test_a_plan_of_another_model_is_refused(plan: TowerPlan) -> None:
    with pytest.raises(PlanError, match="does not fit this model"):
        to_sharding_plan(plan, *spec_of_towers([[(600, 64)], [(10, 8)]]))


def test_widths_that_the_kernel_does_not_take_are_refused() -> None:
    odd = spec_of_towers([[(10, 6)]])
    plan = plan_towers(*odd, Cluster(hosts=1, ranks_per_host=1), tower_bytes=[24])
    with pytest.raises(PlanError, match="'t0' has shards 6 wide"):
        to_sharding_plan(plan, *odd)
    shardings: Any = to_sharding_plan(plan, *odd, pad=True).plan[""]
    assert shardings["t0"].sharding_spec.shards[0].shard_sizes == [10, 8]


def collection_of(plan: TowerPlan, model: Model) -> Any:
    return build_tower_collection(*model, order=plan.tower_order)


def test_the_plan_passes_against_the_towers_in_its_order(plan: TowerPlan, model: Model) -> None:
    check_sharding_plan(to_sharding_plan(plan, *model), collection_of(plan, model), plan=plan)


def test_towers_out_of_host_order_are_refused(plan: TowerPlan, model: Model) -> None:
    with pytest.raises(PlanError, match="in another order than the towers'"):
        check_sharding_plan(
            to_sharding_plan(plan, *model), build_tower_collection(*model), plan=plan
        )


def move_to_other_host(shardings: Any) -> None:
    shardings["t0"].ranks[1] = 3
    shardings["t0"].sharding_spec.shards[1].placement._rank = 3


def widen(shardings: Any) -> None:
    shardings["t0"].sharding_spec.shards[1].shard_sizes[1] = 33


def overlap(shardings: Any) -> None:
    shardings["t0"].sharding_spec.shards[1].shard_offsets[1] = 31


SABOTAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "dropped table": (lambda s: s.pop("t4"), "no sharding for table 't4'"),
    "unknown table": (lambda s: s.update(t99=s["t0"]), "unknown table 't99'"),
    "moved to another host": (
        move_to_other_host,
        r"'t0' is on ranks \[3\], its tower's hosts have \[0, 1\]",
    ),
    "ranks and shards disagree": (lambda s: s["t0"].ranks.reverse(), "lists ranks"),
    "shard too wide": (widen, "do not tile table 't0'"),
    "shards overlap": (overlap, "do not tile table 't0'"),
    "shard lost": (lambda s: s["t1"].sharding_spec.shards.pop(), "do not tile table 't1'"),
    "sharding type": (
        lambda s: setattr(s["t3"], "sharding_type", "row_wise"),
        "'t3' has sharding type 'row_wise'",
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_sharding_plan_is_refused(plan: TowerPlan, model: Model, name: str) -> None:
    sabotage, message = SABOTAGE[name]
    sharding_plan = to_sharding_plan(plan, *model)
    sabotage(sharding_plan.plan[""])
    with pytest.raises(PlanError, match=message):
        check_sharding_plan(sharding_plan, collection_of(plan, model), plan=plan)


def test_the_collection_looks_up_every_feature_in_the_assignment_order(model: Model) -> None:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    spec, assignment = model
    reordered = TowerAssignment(
        towers=(*assignment.towers[:2], ("f4", "g3", "f2", "f3"), assignment.towers[3])
    )
    towers = build_tower_collection(spec, reordered, device="cpu")
    names = spec.feature_names
    lengths = torch.tensor([2, 0, 1] * len(names))
    values = torch.arange(int(lengths.sum())) % 3
    batch = KeyedJaggedTensor(keys=list(names), values=values, lengths=lengths)
    want = []
    for name in [feature for tower in reordered.towers for feature in tower]:
        at = reordered.tower_of[name]
        table = spec.table_of(name).name
        weight = dict(towers.named_parameters())[
            f"towers.{at}.embedding.embedding_bags.{table}.weight"
        ]
        bag = batch[name]
        starts = bag.offsets()[:-1]
        want.append(torch.nn.functional.embedding_bag(bag.values(), weight, starts, mode="sum"))
    assert torch.equal(towers(batch), torch.cat(want, dim=1))


def test_tower_modules_are_used_and_keep_their_parameters(model: Model) -> None:
    spec, assignment = model

    class FirstColumns(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, pooled: list[Any]) -> Any:
            return torch.cat([vector[:, :2] for vector in pooled], dim=1) * self.scale

    modules = [FirstColumns() for _ in assignment.towers]
    towers = build_tower_collection(spec, assignment, modules, order=(2, 0, 1, 3))
    assert [tower.interaction.module for tower in towers.towers] == [
        modules[t] for t in (2, 0, 1, 3)
    ]
    assert [name for name, _ in towers.towers[0].interaction.named_parameters()] == ["module.scale"]


def test_one_table_cannot_be_pooled_in_two_ways() -> None:
    from dataclasses import replace

    spec, assignment = spec_of_towers([[(10, 8)]], shared=[0])
    features = (spec.features[0], FeatureSpec(name="g0", table="t0", pooling="mean"))
    with pytest.raises(PlanError, match="pooled by sum"):
        build_tower_collection(replace(spec, features=features), assignment)
