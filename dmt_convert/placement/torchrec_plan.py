"""A tower plan as TorchRec's sharding plan.

TorchRec's `EmbeddingTowerCollection` holds towers; its sharder takes one parameter sharding per
table, keyed by the table's name alone, and finds a tower's host by the ranks of its tables. It
concatenates the towers' outputs by host, whatever their order in the collection: give it the
towers in the plan's `tower_order`.

Letters: B batch, R ranks per host, T towers.

Source: torchrec/distributed/embedding_tower_sharding.py of torchrec 1.8.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from dmt_convert.documents import shorten
from dmt_convert.errors import PlanError
from dmt_convert.placement.plan_check import check_plan
from dmt_convert.placement.table_memory import COLS_MULTIPLE, padded_dim
from dmt_convert.placement.tower_plan import Shard, TablePlacement, TowerPlan
from dmt_convert.spec import ModelSpec, TowerAssignment

if TYPE_CHECKING:
    from torch import nn
    from torchrec.distributed.types import ParameterSharding, ShardingPlan
    from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection

DeviceType = Literal["cuda", "cpu"]


def to_sharding_plan(
    plan: TowerPlan,
    spec: ModelSpec,
    assignment: TowerAssignment,
    *,
    device: DeviceType = "cuda",
    module_path: str = "",
    replicated_path: str = "replicated",
    pad: bool = False,
) -> ShardingPlan:
    """Build TorchRec's plan, without a process group.

    Every call builds a new one: TorchRec rewrites the plan that it is given.

    Args:
        plan: A plan of this model.
        spec: The flat model.
        assignment: Its features by tower.
        device: Kind of device that the shards lie on.
        module_path: Path of the `EmbeddingTowerCollection` in the module that
            `DistributedModelParallel` wraps; empty if it is that module itself.
        replicated_path: Path of the `EmbeddingBagCollection` of the tables that every rank holds,
            if there are any. TorchRec trains data-parallel tables by an optimizer for dense
            parameters alone; the one that is fused into towers does not move them.
        pad: Whether the collection's tables have `padded_dim` columns, so that those of any dim
            can be placed.

    Raises:
        PlanError: The plan is not of this model, or a shard's width is not a multiple of four,
            which the fused kernel does not take.
    """
    from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

    check_plan(plan, spec, assignment)
    odd = [
        f"table {placement.table!r} has shards {placement.shards[0].cols} wide"
        for placement in plan.tables
        if not placement.is_everywhere
        and _columns(placement, placement.shards[0], pad=pad) % COLS_MULTIPLE
    ]
    if odd:
        raise PlanError(
            f"{len(odd)} table(s) whose width TorchRec's fused kernel does not take",
            expected=f"embedding dims that are multiples of {COLS_MULTIPLE}",
            hint="export the bundle instead; plain torch has no such limit",
            details=shorten(odd),
        )
    modules: dict[str, dict[str, ParameterSharding]] = {module_path: {}}
    for index, placement in enumerate(plan.tables):
        path = replicated_path if placement.is_everywhere else module_path
        found = _parameter_sharding(plan, index, device, pad=pad)
        modules.setdefault(path, {})[placement.table] = found
    return ShardingPlan(
        plan={path: EmbeddingModuleShardingPlan(tables) for path, tables in modules.items()}
    )


def _columns(placement: TablePlacement, shard: Shard, *, pad: bool) -> int:
    """Columns of a shard in memory; what is cut into columns is not padded."""
    return padded_dim(shard.cols) if pad and shard.cols == placement.cols else shard.cols


def _parameter_sharding(
    plan: TowerPlan, index: int, device: DeviceType, *, pad: bool
) -> ParameterSharding:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
    from torchrec.distributed.types import CacheParams, ParameterSharding

    placement = plan.tables[index]
    if placement.is_everywhere:
        return ParameterSharding(
            sharding_type=placement.sharding_type,
            compute_kernel=placement.compute_kernel,
            ranks=list(range(plan.cluster.world_size)),
        )
    return ParameterSharding(
        sharding_type=placement.sharding_type,
        compute_kernel=placement.compute_kernel,
        ranks=[shard.rank for shard in placement.shards],
        cache_params=None
        if placement.cached is None
        else CacheParams(load_factor=placement.cached),
        sharding_spec=EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.row_offset, shard.col_offset],
                    shard_sizes=[shard.rows, _columns(placement, shard, pad=pad)],
                    placement=_device_of(plan, shard.rank, device),
                )
                for shard in placement.shards
            ]
        ),
    )


def _device_of(plan: TowerPlan, rank: int, device: DeviceType) -> str:
    local = "" if device == "cpu" else f":{rank % plan.cluster.ranks_per_host}"
    return f"rank:{rank}/{device}{local}"


def build_tower_collection(
    spec: ModelSpec,
    assignment: TowerAssignment,
    tower_modules: Sequence[nn.Module] | None = None,
    *,
    order: Sequence[int] | None = None,
    device: str = "meta",
) -> EmbeddingTowerCollection:
    """Build TorchRec's towers: an `EmbeddingBagCollection` and an interaction module each.

    Args:
        spec: The flat model.
        assignment: Its features by tower.
        tower_modules: One module per tower of the assignment. It takes the list of the tower's
            pooled embeddings, each (B, N_f), in the assignment's feature order, and returns
            (B, width). None concatenates them.
        order: Tower indices as they shall stand in the collection, such as the plan's
            `tower_order`, which leaves out those on every rank; None keeps the assignment's order.
        device: Where the tables are made; the towers' modules stay where they are, for TorchRec
            cannot move one from the meta device.

    Returns:
        A collection whose module `towers.{i}` is tower `order[i]`.
    """
    import torch
    from torchrec.modules.embedding_tower import EmbeddingTowerCollection

    indices = list(range(len(assignment.towers))) if order is None else list(order)
    assert set(indices) <= set(range(len(assignment.towers))), indices
    on = torch.device(device)
    towers = [
        _build_tower(spec, assignment.towers[t], tower_modules[t] if tower_modules else None, on)
        for t in indices
    ]
    return EmbeddingTowerCollection(towers, device=on)


def _build_tower(
    spec: ModelSpec, features: Sequence[str], module: nn.Module | None, device: object
) -> EmbeddingTower:
    from torchrec.modules.embedding_configs import (
        DataType,
        EmbeddingBagConfig,
        PoolingType,
    )
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.modules.embedding_tower import EmbeddingTower

    dtypes = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}
    mine = set(features)
    by_table: dict[str, list[str]] = {}
    poolings: dict[str, set[str]] = {}
    for feature in spec.features:
        if feature.name in mine:
            by_table.setdefault(feature.table, []).append(feature.name)
            poolings.setdefault(feature.table, set()).add(feature.pooling)
    mixed = sorted(table for table, kinds in poolings.items() if len(kinds) > 1)
    if mixed:
        raise PlanError(
            f"tables {mixed} are pooled by sum for one feature and by mean for another",
            expected="one pooling per table, which is all that TorchRec has",
            hint="export the bundle instead; plain torch has no such limit",
        )
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=by_table[table.name],
            pooling=PoolingType.MEAN if "mean" in poolings[table.name] else PoolingType.SUM,
            data_type=dtypes[table.dtype],
        )
        for table in spec.tables
        if table.name in by_table
    ]
    return EmbeddingTower(
        EmbeddingBagCollection(tables=configs, device=device),
        _tower_interaction(features, module),
    )


def _tower_interaction(features: Sequence[str], module: nn.Module | None) -> nn.Module:
    """Adapt a tower's module to what TorchRec hands it: a `KeyedTensor` in table order."""
    import torch
    from torchrec.sparse.jagged_tensor import KeyedTensor

    class TowerInteraction(torch.nn.Module):
        """Picks the tower's features in their order, then runs the tower's module."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module
            # TorchRec wraps every interaction in DistributedDataParallel, which refuses a
            # module that has nothing to train.
            trains = module is not None and any(p.requires_grad for p in module.parameters())
            self.anchor = None if trains else torch.nn.Parameter(torch.zeros(1))

        def forward(self, embeddings: KeyedTensor) -> torch.Tensor:
            by_name = embeddings.to_dict()
            pooled = [by_name[name] for name in features]
            output = torch.cat(pooled, dim=1) if self.module is None else self.module(pooled)
            if self.anchor is not None:
                # Adds an exact zero, so that the anchor has a gradient.
                output = output + 0 * self.anchor
            return output

    return TowerInteraction()


def check_sharding_plan(
    sharding_plan: ShardingPlan,
    collection: EmbeddingTowerCollection,
    *,
    plan: TowerPlan,
    module_path: str = "",
) -> None:
    """Hold a TorchRec plan against the towers that it is to shard, by TorchRec's own rules.

    Args:
        sharding_plan: What `to_sharding_plan` built, before TorchRec has used it.
        collection: The towers; tables may be on the meta device.
        plan: The plan that it was built from, for the hosts of the towers.
        module_path: Path of the collection, as for `to_sharding_plan`.

    Raises:
        PlanError: A table is missing or unknown, its shards do not tile it, a rank is outside
            its tower's hosts, a sharding type is not the tower sharder's, or the towers do not
            stand in the order of their hosts; all that is wrong is listed.
    """
    from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerCollectionSharder

    module_plan: Mapping[str, ParameterSharding] = sharding_plan.plan.get(module_path, {})
    sharder = EmbeddingTowerCollectionSharder()
    parameters = sharder.shardable_parameters(collection)
    types = sharder.sharding_types("cuda")
    placed = {placement.table: placement for placement in plan.tables}
    problems = [f"no sharding for table {n!r}" for n in parameters if n not in module_plan]
    problems += [f"unknown table {n!r} has a sharding" for n in module_plan if n not in parameters]
    for name in parameters.keys() & module_plan.keys() & placed.keys():
        sharding = module_plan[name]
        if sharding.sharding_type not in types:
            problems.append(f"table {name!r} has sharding type {sharding.sharding_type!r}")
        problems += _shard_problems(name, sharding, tuple(parameters[name].shape))
        ranks = plan.ranks_of(placed[name].tower)
        outside = sorted(set(sharding.ranks or ()) - set(ranks))
        if outside:
            problems.append(
                f"table {name!r} is on ranks {outside}, its tower's hosts have {list(ranks)}"
            )
    problems += _order_problems(collection, module_plan, plan)
    if problems:
        raise PlanError(
            f"TorchRec cannot shard these towers by this plan: {len(problems)} problem(s)",
            expected="every table once, tiled by shards on its tower's hosts, towers by host",
            hint="build both from one TowerPlan, the towers with order=plan.tower_order",
            details=shorten(sorted(problems)),
        )


def _shard_problems(name: str, sharding: ParameterSharding, shape: tuple[int, ...]) -> list[str]:
    shards = list(sharding.sharding_spec.shards)
    placed_on = [shard.placement.rank() for shard in shards]
    problems = []
    if placed_on != list(sharding.ranks or ()):
        problems.append(f"table {name!r} lists ranks {sharding.ranks}, its shards {placed_on}")
    boxes = [(*shard.shard_offsets, *shard.shard_sizes) for shard in shards]
    area = sum(rows * cols for _, _, rows, cols in boxes)
    inside = all(
        min(top, left) >= 0 and top + rows <= shape[0] and left + cols <= shape[1]
        for top, left, rows, cols in boxes
    )
    # Disjoint: along one direction, each begins where the one before ends, or later.
    apart = any(all(a[d] + a[d + 2] <= b[d] for a, b in pairwise(boxes)) for d in (0, 1))
    if not (inside and apart and area == shape[0] * shape[1]):
        problems.append(f"the shards {boxes} do not tile table {name!r} of shape {shape}")
    return problems


def _order_problems(
    collection: EmbeddingTowerCollection,
    module_plan: Mapping[str, ParameterSharding],
    plan: TowerPlan,
) -> list[str]:
    """Check that TorchRec's concatenation by host keeps the order of the towers."""
    group_ranks = plan.hosts_per_tower * plan.cluster.ranks_per_host
    problems, groups = [], []
    for index, tower in enumerate(collection.towers):
        names = [config.name for config in tower.embedding.embedding_bag_configs()]
        mine = {
            rank // group_ranks
            for name in names
            if name in module_plan
            for rank in module_plan[name].ranks or ()
        }
        if len(mine) > 1:
            problems.append(f"tower {index} lies on {len(mine)} groups of hosts: {sorted(mine)}")
        groups.append(min(mine, default=0))
    if groups != sorted(groups):
        problems.append(
            f"the towers are on groups of hosts {groups}; TorchRec puts outputs side by side by "
            "host, in another order than the towers'"
        )
    return problems
