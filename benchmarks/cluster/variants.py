"""What is compared: each variant trains the same model on the same batches in its own way.

To add one: name it in `settings.parse_variant`, build it in `build`.
Letters: B samples per rank, F features, N embedding dim, O tower outputs of all towers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import embedding_tower_sharding
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster import JaggedBatch, Transport, fused_parameters, shard_model
from dmt_convert.model import DmtModel, DmtSpec, build_tower_module
from dmt_convert.placement import TowerPlan, build_tower_collection, to_sharding_plan
from dmt_convert.placement.predict.cost_model import planned_load
from dmt_convert.spec import CommDtype, ModelSpec

from .case_model import (
    Batch,
    DensePart,
    dmt_spec,
    fill_tables,
    flat_spec,
    place_towers,
    set_code_ranges,
)
from .settings import Settings, VariantName, parse_variant

CPU = torch.device("cpu")


class Variant(Protocol):
    """One way to train, on one rank."""

    name: str
    """As `parse_variant` reads it."""
    planned: int | None
    """Bytes of tower outputs and their gradients that the plan has cross hosts in a step; None
    without a plan of ours."""

    def step(self, batch: Batch) -> Tensor:
        """Forward, `RankContext.compute`, backward, all optimizers.

        Args:
            batch: This rank's samples.

        Returns:
            Their mean loss before the step, detached.
        """
        ...


@dataclass(slots=True, kw_only=True)
class RankContext:
    """Where a variant runs. The default process group holds all ranks, host by host."""

    rank: int
    """Global rank."""
    local_rank: int
    """Rank inside its host."""
    world_size: int
    """All ranks."""
    local_world_size: int
    """Ranks per host."""
    compute_s: float
    """Modelled compute of an accelerator in every step, in seconds."""
    computed: int = 0
    """Calls of `compute`."""

    def compute(self) -> None:
        """Stand for the accelerator's compute: call it once a step, between forward and backward.

        It sleeps, so the processor and the links are free meanwhile.
        """
        self.computed += 1
        if self.compute_s:
            time.sleep(self.compute_s)


def build(name: str, settings: Settings, context: RankContext) -> Variant:
    """Build a variant; all ranks call it with the same name at the same time.

    Raises:
        ConfigError: It is not known.
    """
    parsed = parse_variant(name, dim=settings.dim)
    torch.manual_seed(settings.seed)
    if parsed.family == "flat":
        return build_flat(name, parsed, settings, context)
    if parsed.family == "torchrec-towers":
        return build_torchrec_towers(name, parsed, settings, context)
    return OwnVariant(name, parsed, settings, context)


class OwnVariant:
    """Our engine: SPTT with or without tower modules.

    Args:
        name: Of the variant.
        parsed: What it says.
        settings: Of the run.
        context: This rank.
    """

    def __init__(
        self, name: str, parsed: VariantName, settings: Settings, context: RankContext
    ) -> None:
        self.name = name
        self.context = context
        self.keys = list(flat_spec(settings).feature_names)
        self.prefetch = parsed.prefetch
        self.ahead: tuple[Batch, JaggedBatch] | None = None
        spec = dmt_spec(settings, parsed)
        empty = [nn.Module() for _ in spec.towers]  # the tables are made sharded
        model = DmtModel(spec, tables=empty)
        set_code_ranges(settings, model)
        if parsed.fixed:
            assert model.restore is not None  # a linear tower
            model.restore.requires_grad_(False)
        comm_dtype: CommDtype | None = "bf16" if parsed.precision == "bf16" else None
        plan = place_towers(settings, spec)
        self.planned: int | None = planned_bytes(settings, spec, plan, comm_dtype)
        self.model = shard_model(
            model,
            plan,
            transport=Transport(CPU, "gloo"),
            fused_params=fused_parameters("rowwise-adagrad", lr=settings.learning_rate),
            comm_dtype=comm_dtype,
        )
        fill_tables(settings, self.model.parallel.state_dict())
        dense = [p for p in self.model.dense_parameters().values() if p.requires_grad]
        self.optimizer = torch.optim.SGD(dense, lr=settings.learning_rate)

    def step(self, batch: Batch) -> Tensor:
        """See `Variant`."""
        if self.ahead is not None and self.ahead[0] is batch:
            jagged = self.ahead[1]
        else:
            jagged = self._jagged(batch)
        if self.prefetch:
            self.ahead = batch.upcoming, self._jagged(batch.upcoming)
            self.model.towers.start_input(self.ahead[1].sparse)
        logits = self.model(jagged)
        if self.prefetch:
            self.model.towers.advance_input()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        self.context.compute()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _jagged(self, batch: Batch) -> JaggedBatch:
        ids = KeyedJaggedTensor(self.keys, batch.values, lengths=batch.lengths)
        return JaggedBatch(dense=batch.dense, sparse=ids, labels=batch.labels)


class TorchRecVariant:
    """A model under TorchRec's DistributedModelParallel.

    Args:
        name: Of the variant.
        model: Takes dense inputs and ids, gives logits.
        sharding: Of the tables.
        sharder: What shards them.
        settings: Of the run.
        context: This rank.
    """

    planned: int | None = None

    def __init__(
        self,
        name: str,
        model: nn.Module,
        sharding: ShardingPlan,
        sharder: object,
        settings: Settings,
        context: RankContext,
    ) -> None:
        self.name = name
        self.context = context
        self.keys = list(flat_spec(settings).feature_names)
        self.model = DistributedModelParallel(model, device=CPU, plan=sharding, sharders=[sharder])
        fill_tables(settings, self.model.state_dict())
        dense = [
            parameter
            for path, parameter in in_backward_optimizer_filter(self.model.named_parameters())
            if ".embedding_bags." not in path
        ]
        self.optimizer = torch.optim.SGD(dense, lr=settings.learning_rate)

    def step(self, batch: Batch) -> Tensor:
        """See `Variant`."""
        ids = KeyedJaggedTensor(self.keys, batch.values, lengths=batch.lengths)
        logits = self.model(batch.dense, ids)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        self.context.compute()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def build_flat(
    name: str, parsed: VariantName, settings: Settings, context: RankContext
) -> TorchRecVariant:
    """Flat hybrid parallelism: whole tables over all ranks, the rest data-parallel."""
    spec = flat_spec(settings)
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=feature.table,
                num_embeddings=settings.rows,
                embedding_dim=settings.dim,
                feature_names=[feature.name],
            )
            for feature in spec.features
        ],
        device=torch.device("meta"),
    )
    sharder = EmbeddingBagCollectionSharder(**sharder_options(parsed, settings))
    ranks = even_ranks(settings)
    sharding = construct_module_sharding_plan(
        collection,
        {
            f.table: table_wise(rank=ranks[i], compute_kernel="fused")
            for i, f in enumerate(spec.features)
        },
        sharder=sharder,
        local_size=context.local_world_size,
        world_size=context.world_size,
        device_type="cpu",
    )
    model = FlatModel(collection, spec, DensePart(dmt_spec(settings, parsed)))
    plan = ShardingPlan({"collection": sharding})
    return TorchRecVariant(name, model, plan, sharder, settings, context)


def build_torchrec_towers(
    name: str, parsed: VariantName, settings: Settings, context: RankContext
) -> TorchRecVariant:
    """TorchRec's towers as they ship, with what they need to run on a CPU at all.

    Without compression a tower passes its embeddings on.
    """
    # TorchRec passes device_ids=[cpu], which DistributedDataParallel refuses.
    embedding_tower_sharding.DistributedDataParallel = ddp_without_device_ids
    spec = dmt_spec(settings, parsed)
    plan = place_towers(settings, spec)
    modules = None
    if not spec.is_passthrough:
        modules = [
            JoinedTower(build_tower_module(tower.module, spec.tower_dims(t)))
            for t, tower in enumerate(spec.towers)
        ]
    collection = build_tower_collection(spec.flat, spec.assignment, modules)
    sharding = to_sharding_plan(
        plan, spec.flat, spec.assignment, device="cpu", module_path="collection"
    )
    sharder = embedding_tower_sharding.EmbeddingTowerCollectionSharder(
        **sharder_options(parsed, settings)
    )
    model = TowersModel(collection, DensePart(spec))
    return TorchRecVariant(name, model, sharding, sharder, settings, context)


def ddp_without_device_ids(**options: Any) -> DistributedDataParallel:
    """Make DistributedDataParallel for a module on the CPU."""
    return DistributedDataParallel(**(options | {"device_ids": None}))


def even_ranks(settings: Settings) -> list[int]:
    """Rank of every table: a rank of every host in turn, so that all carry alike."""
    topology = settings.topology
    order = [
        host * topology.ranks_per_host + local
        for local in range(topology.ranks_per_host)
        for host in range(topology.hosts)
    ]
    return [order[i % len(order)] for i in range(settings.features)]


def sharder_options(parsed: VariantName, settings: Settings) -> dict[str, Any]:
    """Fused row-wise Adagrad, and 16-bit or 8-bit exchanges where they are asked for."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    codecs = None
    if parsed.precision != "fp32":
        sent = CommType.INT8 if parsed.precision == "int8" else CommType.FP16
        config = QCommsConfig(forward_precision=sent, backward_precision=sent)
        codecs = get_qcomm_codecs_registry(config, device=CPU)
    return {
        "fused_params": {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": settings.learning_rate,
        },
        "qcomm_codecs_registry": codecs,
    }


def planned_bytes(
    settings: Settings, spec: DmtSpec, plan: TowerPlan, comm_dtype: CommDtype | None
) -> int:
    """Bytes of tower outputs and their gradients that the plan has cross hosts in a step.

    Every message of levels has one byte more.

    Args:
        settings: Of the run.
        spec: The converted model.
        plan: Where its towers are.
        comm_dtype: Precision of what has no code.
    """
    topology = settings.topology
    ids = float(settings.pooling)
    traffic = planned_load(spec, plan, ids, comm_dtype=comm_dtype).traffic
    a_sample = traffic.dmt_cross_bytes + traffic.gradient_cross_bytes
    code = spec.towers[0].module.code
    marked = code is not None and code.precision == "int8"
    marks = topology.world_size * (topology.hosts - 1) if marked else 0
    return round(a_sample * settings.batch * topology.world_size) + marks


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes of tower outputs and gradients that this rank hands over for every rank.

    They alone travel as bytes; ids are whole numbers, and dense gradients are summed by others.
    """
    sent = [0] * dist.get_world_size()
    send = dist.ProcessGroup.send
    kept = vars(dist.ProcessGroup)["send"]  # which binds, unlike what the class gives

    def counted(group: Any, tensors: list[Tensor], peer: int, tag: int) -> Any:
        if tensors[0].dtype == torch.uint8:
            sent[dist.get_global_rank(group, peer)] += sum(t.numel() for t in tensors)
        return send(group, tensors, peer, tag)

    dist.ProcessGroup.send = counted  # type: ignore[method-assign,assignment]
    try:
        yield sent
    finally:
        dist.ProcessGroup.send = kept  # type: ignore[method-assign]


class FlatModel(nn.Module):
    """Tables, and the dense part over them."""

    def __init__(
        self, collection: EmbeddingBagCollection, spec: ModelSpec, dense_part: DensePart
    ) -> None:
        super().__init__()
        self.names = spec.feature_names
        self.collection = collection
        self.dense_part = dense_part

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        """Return logits, shape (B,)."""
        pooled = self.collection(ids)  # on its way; waited for by to_dict
        dense_BN = self.dense_part.dense_arch(dense)
        by_name = pooled.to_dict()
        pooled_BM = torch.cat([by_name[name] for name in self.names], dim=1)
        logits: Tensor = self.dense_part(dense_BN, pooled_BM)
        return logits


class TowersModel(nn.Module):
    """TorchRec's towers, and the dense part over what they emit."""

    def __init__(self, collection: nn.Module, dense_part: DensePart) -> None:
        super().__init__()
        self.collection = collection
        self.dense_part = dense_part

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        """Return logits, shape (B,)."""
        emitted = self.collection(ids)  # on its way
        dense_BN = self.dense_part.dense_arch(dense)
        logits: Tensor = self.dense_part(dense_BN, emitted.wait())
        return logits


class JoinedTower(nn.Module):
    """A tower module of ours, fed with the list of embeddings that TorchRec's tower gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Map F_t tensors of shape (B, N) to (B, width)."""
        emitted: Tensor = self.module(torch.cat(list(pooled), dim=1))
        return emitted


def mean_over_ranks(loss: Tensor) -> float:
    """Mean of every rank's loss; a collective."""
    total = loss.clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
