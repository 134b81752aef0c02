"""A converted model over the ranks of a cluster.

Letters: B samples of one rank, O elements that all towers emit per sample, T towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.index_route import JaggedBatch
from dmt_convert.cluster.padding import Width, find_widths, trim_shards
from dmt_convert.cluster.replicated import ReplicatedTables
from dmt_convert.cluster.sharded_towers import ShardedTowers, TowersSharder
from dmt_convert.cluster.tower_head import TowerHead, anchor
from dmt_convert.cluster.transport import Transport
from dmt_convert.cluster.wire import choose_formats
from dmt_convert.config import DenseCommDtype
from dmt_convert.model import DmtModel, DmtSpec, Head
from dmt_convert.placement import TowerPlan, to_sharding_plan
from dmt_convert.spec import CommDtype

TOWERS = "towers"
"""Where the towers are in a `ClusterModel`."""


class ClusterModel(nn.Module):
    """Towers, and what is over them; `shard_model` spreads it over ranks.

    Args:
        model: The converted model. Its modules are taken over; its tables are not.
        order: Tower indices by host, as TorchRec puts their outputs side by side.
        widths: Table -> how its rows lie in memory.
        weighted: Whether ids come with weights.
        lr: The tables' learning rate.
        transport: Of this rank.
    """

    def __init__(
        self,
        model: DmtModel,
        order: Sequence[int],
        widths: Mapping[str, Width],
        *,
        weighted: bool,
        lr: float,
        transport: Transport,
    ) -> None:
        super().__init__()
        spec = model.spec
        everywhere = any(tower.everywhere for tower in spec.towers)
        self.replicated = ReplicatedTables(spec, transport) if everywhere else None
        modules = [tower.tower_module for tower in model.tower_list]
        self.towers: nn.Module = EmbeddingTowerCollection(
            [
                EmbeddingTower(
                    _build_bags(spec, t, widths, weighted=weighted, lr=lr),
                    _build_head(spec, t, modules[t], widths, transport),
                )
                for t in order
            ],
            device=torch.device("meta"),
        )
        model.towers = nn.ModuleList()
        self.head: Head = model
        # a network may hold parameters that it does not use; data-parallel waits for all
        network = spec.interaction.network is not None
        self._anchored = tuple(model.interaction.parameters()) if network else ()

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return logits.

        Args:
            dense: Dense inputs, shape (B, D).
            sparse: Ids of all features.

        Returns:
            Shape (B,).
        """
        coming = self.towers(sparse)
        dense_BN = self.head.dense_arch(dense)
        # looked up while the others are on their way
        own = [] if self.replicated is None else [self.replicated(sparse)]
        emitted = coming.wait()
        logits = self.head.finish(dense_BN, torch.cat([emitted, *own], dim=1) if own else emitted)
        return anchor(logits, *self._anchored) if self._anchored else logits


def _build_bags(
    spec: DmtSpec, tower: int, widths: Mapping[str, Width], *, weighted: bool, lr: float
) -> EmbeddingBagCollection:
    features = spec.towers[tower].features
    by_table: dict[str, list[str]] = {}
    for feature in spec.flat.features:
        if feature.name in features:
            by_table.setdefault(feature.table, []).append(feature.name)
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=widths[table.name].padded,
            feature_names=by_table[table.name],
            pooling=PoolingType.SUM,  # means come as weights, see `jagged`
        )
        for table in spec.flat.tables
        if table.name in by_table
    ]
    bags = EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device("meta"))
    for name, bag in bags.embedding_bags.items():
        if widths[name].factor != 1:  # TorchRec makes a kernel for every learning rate
            bag.weight._optimizer_kwargs = [{"lr": lr / widths[name].factor}]
    return bags


def _build_head(
    spec: DmtSpec,
    tower: int,
    module: nn.Module,
    widths: Mapping[str, Width],
    transport: Transport,
) -> TowerHead:
    features = spec.towers[tower].features
    columns = (sum(spec.tower_widths[:tower]), spec.tower_widths[tower])
    dims = [widths[spec.flat.table_of(name).name] for name in features]
    return TowerHead(features, dims, module, columns, transport)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardedModel:
    """A model spread over the ranks."""

    parallel: DistributedModelParallel
    """What is trained: gradients of what every rank has are averaged, tables are sharded."""
    towers: ShardedTowers
    """Its towers."""
    widths: Mapping[str, Width]
    """Table -> how its rows lie in memory."""
    weighted: bool
    """Whether ids come with weights."""
    transport: Transport
    """This rank's device, and how it exchanges with others."""

    def __call__(self, batch: JaggedBatch) -> Tensor:
        """Return logits, shape (B,)."""
        logits: Tensor = self.parallel(batch.dense, batch.sparse)
        return logits

    @property
    def core(self) -> ClusterModel:
        """The model inside all wrappers."""
        found = self.parallel.module
        assert isinstance(found, ClusterModel)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all weights, tables as they are cut, in their true widths; shares memory."""
        return self.trim(self.parallel.state_dict())

    def trim(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Cut tables, or what has their shapes, by their names to their true widths."""
        return {
            name: trim_shards(value, width.dim)
            if isinstance(value, ShardedTensor) and (width := self.widths[table_of(name)]).is_padded
            else value
            for name, value in state.items()
        }

    @property
    def replicated(self) -> dict[str, nn.Parameter]:
        """Tables that every rank holds, by name, shape (R, N)."""
        tables = self.core.replicated
        return {} if tables is None else tables.weights

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Everything but tables, by name; tower modules are those of this rank's host."""
        return {
            name: value
            for name, value in self.parallel.named_parameters()
            if ".embedding_bags." not in name and not name.endswith(".anchor")
        }


def table_of(name: str) -> str:
    """Return the table that a tensor's name in a state dict is of."""
    return name.rsplit(".embedding_bags.", 1)[-1].removesuffix(".weight")


def shard_model(
    model: DmtModel,
    plan: TowerPlan,
    *,
    transport: Transport,
    fused_params: dict[str, Any],
    comm_dtype: CommDtype | None = None,
    dense_comm_dtype: DenseCommDtype = "fp32",
    weighted: bool = False,
) -> ShardedModel:
    """Spread a model over the ranks of its plan; all ranks at once.

    Args:
        model: The model, dense parts in memory. Its modules are taken over.
        plan: Where its towers go; of as many ranks as there are.
        transport: This rank's device, and how it exchanges with others.
        fused_params: The tables' optimizer, from `fused_parameters`.
        comm_dtype: Precision between hosts of what has no code; None: fp32, and that of their code
            for gradients.
        dense_comm_dtype: Precision in which gradients are averaged of what every rank has.
        weighted: Whether ids come with weights.

    Returns:
        The model with its tables uninitialised.

    Raises:
        PlanError: The plan is not of this model.
        BundleError: Hosts do not have the same codes.
    """
    spec = model.spec
    on = transport.device
    sharding = to_sharding_plan(
        plan,
        spec.flat,
        spec.assignment,
        device="cuda" if on.type == "cuda" else "cpu",
        module_path=TOWERS,
        pad=True,
    )
    widths = find_widths(spec.flat.tables, fused_params)
    lr = fused_params["learning_rate"]
    modules = [tower.tower_module for tower in model.tower_list]
    formats = choose_formats(spec, modules, comm_dtype, on)
    parallel = DistributedModelParallel(
        ClusterModel(
            model, plan.tower_order, widths, weighted=weighted, lr=lr, transport=transport
        ),
        device=on,
        plan=ShardingPlan(plan={TOWERS: sharding.plan[TOWERS]}),
        data_parallel_wrapper=DefaultDataParallelWrapper(
            allreduce_comm_precision=None if dense_comm_dtype == "fp32" else dense_comm_dtype
        ),
        sharders=[TowersSharder(fused_params, formats=formats, transport=transport)],
    )
    core = parallel.module
    towers = core.towers
    assert isinstance(core, ClusterModel) and isinstance(towers, ShardedTowers)
    own = [] if core.replicated is None else core.replicated.columns
    core.head.expect_columns([*towers.arriving_columns(), *own])
    _clear_padding(towers, widths)
    return ShardedModel(
        parallel=parallel, towers=towers, widths=widths, weighted=weighted, transport=transport
    )


def _clear_padding(towers: ShardedTowers, widths: Mapping[str, Width]) -> None:
    for name, value in towers.state_dict().items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                # of a table that is cut into columns there is nothing to clear
                shard.tensor.detach()[:, widths[table_of(name)].dim :] = 0
