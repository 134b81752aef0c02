"""What ranks do to compare the lookups of sharded towers with plain ones; run by `rank_server`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import embedding_tower_sharding
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.placement import TowerPlan
from dmt_convert.placement.torchrec_plan import (
    build_tower_collection,
    check_sharding_plan,
    to_sharding_plan,
)
from dmt_convert.spec import ModelSpec, TowerAssignment

SAMPLES = 5


def ddp_without_device_ids(**kwargs: Any) -> DistributedDataParallel:
    """TorchRec passes device_ids=[cpu], which DistributedDataParallel refuses."""
    return DistributedDataParallel(**(kwargs | {"device_ids": None}))


def bags(spec: ModelSpec, rank: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(rank)
    lengths, values = [], []
    for feature in spec.features:
        mine = torch.randint(0, 4, (SAMPLES,), generator=generator)
        rows = spec.table(feature.table).rows
        lengths.append(mine)
        values.append(torch.randint(0, rows, (int(mine.sum()),), generator=generator))
    return KeyedJaggedTensor(
        keys=list(spec.feature_names), values=torch.cat(values), lengths=torch.cat(lengths)
    )


def whole_table(name: str, shape: torch.Size) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(-8, 9, tuple(shape), generator=generator).float()


def fill(sharded: torch.nn.Module) -> None:
    """Write every local shard's part of the whole table."""
    for name, value in sharded.state_dict().items():
        if ".embedding_bags." not in name:
            continue
        whole = whole_table(name.split(".")[-2], value.size())
        for shard in value.local_shards():
            (top, left), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(whole[top : top + rows, left : left + cols])


def compare(
    spec: ModelSpec, assignment: TowerAssignment, plan: TowerPlan, order: tuple[int, ...] | None
) -> str:
    """Say whether the sharded towers look up the same, or the same in the plan's order."""
    plain = build_tower_collection(spec, assignment, device="cpu", order=order)
    towers = build_tower_collection(spec, assignment, order=order)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".embedding_bags." in name:
                parameter.copy_(whole_table(name.split(".")[-2], parameter.shape))
    sharding_plan = to_sharding_plan(plan, spec, assignment, device="cpu")
    if order is not None:
        check_sharding_plan(sharding_plan, towers, plan=plan)
    sharded = DistributedModelParallel(
        towers,
        device=torch.device("cpu"),
        plan=sharding_plan,
        sharders=[embedding_tower_sharding.EmbeddingTowerCollectionSharder()],
    )
    with torch.no_grad():
        fill(sharded)
    batch = bags(spec, dist.get_rank())
    got, want = sharded(batch).wait(), plain(batch)
    blocks = want.split([sum(spec.table_of(f).dim for f in t) for t in assignment.towers], dim=1)
    permuted = torch.cat([blocks[t] for t in plan.tower_order], dim=1)
    verdicts = torch.tensor([torch.equal(got, want), torch.equal(got, permuted)]).float()
    dist.all_reduce(verdicts, op=dist.ReduceOp.MIN)
    return "same" if verdicts[0] else "permuted" if verdicts[1] else "different"


def compare_lookups(spec: dict[str, Any], towers: list[list[str]], plan: Any) -> list[str]:
    """The verdicts with the plan's tower order and without."""
    embedding_tower_sharding.DistributedDataParallel = ddp_without_device_ids
    model, planned = ModelSpec.from_json(spec), TowerPlan.from_json(plan)
    assignment = TowerAssignment(towers=tuple(map(tuple, towers)))
    return [compare(model, assignment, planned, order) for order in (planned.tower_order, None)]


SCENARIOS = {"compare_lookups": compare_lookups}
