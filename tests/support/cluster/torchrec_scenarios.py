"""A model sharded by TorchRec, trained, saved, and loaded in another sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.checkpoint_store import CheckpointStore

TABLES = {"t_0": (50, 16), "t_1": (37, 32), "t_2": (21, 8)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"]
                )
                for name, (rows, dim) in TABLES.items()
            ],
            device=torch.device("meta"),
        )

    def forward(self, bags: KeyedJaggedTensor) -> Any:
        return self.embedding(bags)


def sharded_model(kinds: str) -> DistributedModelParallel:
    """`kinds` says how tables are sharded: r row-wise, c column-wise, t table-wise."""
    model, size = Model(), dist.get_world_size()
    apply_optimizer_in_backward(
        RowWiseAdagrad, model.embedding.parameters(), {"lr": 0.1, "eps": 1e-8}
    )
    ways = {
        "r": lambda: row_wise(),
        "c": lambda: column_wise(ranks=[rank % size for rank in range(2)]),
        "t": lambda: table_wise(rank=size - 1),
    }
    plan = construct_module_sharding_plan(
        model.embedding,
        {name: ways[kind]() for name, kind in zip(TABLES, kinds, strict=True)},
        sharder=EmbeddingBagCollectionSharder(),
        local_size=size,
        world_size=size,
        device_type="cpu",
    )
    for sharding in plan.values():
        sharding.compute_kernel = EmbeddingComputeKernel.FUSED.value
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"embedding": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )


def bags(seed: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(0, rows, (6,), generator=generator) for rows, _ in TABLES.values()]
    lengths = torch.full((len(TABLES) * 6,), 1)
    return KeyedJaggedTensor(
        keys=[f"f_{name}" for name in TABLES], values=torch.cat(values), lengths=lengths
    )


def looked_up(model: DistributedModelParallel, seed: int) -> torch.Tensor:
    pooled = model(bags(seed)).wait()
    return torch.cat([pooled[f"f_{name}"] for name in TABLES], dim=1)  # its own order differs


def state_of(model: DistributedModelParallel) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()["state"]}


def train_and_save(folder: str, kinds: str) -> list[Any]:
    """Train two steps, save in the background, train on; then look up what was saved."""
    torch.manual_seed(0)
    model = sharded_model(kinds)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for shard in tensor.local_shards():
                top, left = shard.metadata.shard_offsets
                rows, dim = TABLES[name.split(".")[-2]]
                whole = torch.arange(rows * dim, dtype=torch.float32).reshape(rows, dim) / 1000
                height, width = shard.metadata.shard_sizes
                shard.tensor.copy_(whole[top : top + height, left : left + width])
    for step in range(2):
        looked_up(model, seed=step).square().sum().backward()
    store = CheckpointStore(Path(folder))
    with torch.no_grad():
        before = looked_up(model, seed=9)
    store.save(2, state_of(model), {}, asynchronous=True)
    looked_up(model, seed=2).square().sum().backward()
    store.close()
    with torch.no_grad():
        return [before.tolist(), looked_up(model, seed=9).tolist()]


def load_and_train(folder: str, kinds: str) -> list[Any]:
    """Load into another sharding; look up before and after one more step."""
    model = sharded_model(kinds)
    store = CheckpointStore(Path(folder))
    saved = store.newest()
    assert saved is not None
    store.load(saved, state_of(model))
    store.close()
    with torch.no_grad():
        before = looked_up(model, seed=9)
    looked_up(model, seed=2).square().sum().backward()
    with torch.no_grad():
        return [before.tolist(), looked_up(model, seed=9).tolist()]


SCENARIOS = {"train_and_save": train_and_save, "load_and_train": load_and_train}
