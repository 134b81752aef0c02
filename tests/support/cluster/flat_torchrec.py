"""The flat model as TorchRec trains it: DistributedModelParallel over one EmbeddingBagCollection.

It is what the engine is held against; nothing of the engine is in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.model import DmtModel, FlatModel
from dmt_convert.spec import ModelSpec


class FlatTorchRec(nn.Module):
    """dense_arch, one collection of tables, interaction, over_arch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.names = list(spec.feature_names)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name,
                    num_embeddings=table.rows,
                    embedding_dim=table.dim,
                    feature_names=[f.name for f in spec.features if f.table == table.name],
                    pooling=PoolingType[spec.features[0].pooling.upper()],
                )
                for table in spec.tables
            ],
            device=torch.device("meta"),
        )
        self.head = FlatModel(spec, nn.Identity())

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return logits, shape (B,)."""
        pooled = self.tables(sparse).to_dict()
        logits: Tensor = self.head.forward_pooled(
            dense, torch.cat([pooled[name] for name in self.names], dim=1)
        )
        return logits


def shard_flat(
    model: DmtModel,
    tables: dict[str, Tensor],
    *,
    world_size: int,
    fused_params: dict[str, Any],
    column_cuts: dict[str, int],
) -> DistributedModelParallel:
    """Spread the flat model of a passthrough model over all ranks, with its weights.

    Args:
        model: The passthrough model; its dense parts are copied.
        tables: Table -> weights.
        world_size: Number of ranks.
        fused_params: The tables' optimizer.
        column_cuts: Table -> shards, where it is cut into columns; whole tables go to the ranks
            in turn.
    """
    flat = FlatTorchRec(model.spec.flat)
    own = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("towers.")}
    flat.head.load_state_dict(own)
    plan = EmbeddingModuleShardingPlan()
    for i, table in enumerate(model.spec.flat.tables):
        count = column_cuts.get(table.name, 1)
        cols = table.dim // count
        ranks = [(i + part) % world_size for part in range(count)]
        plan[table.name] = ParameterSharding(
            sharding_type="table_wise" if count == 1 else "column_wise",
            compute_kernel="fused",
            ranks=ranks,
            sharding_spec=EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=[0, part * cols],
                        shard_sizes=[table.rows, cols],
                        placement=f"rank:{rank}/cpu",
                    )
                    for part, rank in enumerate(ranks)
                ]
            ),
        )
    parallel = DistributedModelParallel(
        flat,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"tables": plan}),
        sharders=[EmbeddingBagCollectionSharder(fused_params)],
    )
    for name, top, left, part in flat_shards(parallel):
        part.copy_(tables[name][top : top + len(part), left : left + part.shape[1]])
    return parallel


def flat_shards(parallel: DistributedModelParallel) -> list[tuple[str, int, int, Tensor]]:
    """This rank's shards: table, first row, first column, rows of it (shares memory)."""
    return [
        (name.split(".")[-2], *map(int, shard.metadata.shard_offsets), shard.tensor)
        for name, value in parallel.state_dict().items()
        if ".embedding_bags." in name
        for shard in value.local_shards()
    ]
