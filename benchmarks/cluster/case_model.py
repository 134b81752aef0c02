"""The model that the benchmark trains, and its batches.

A DLRM with dot interaction. Its dense layers are small on purpose: a batch here has hundreds of
samples, not the tens of thousands of a cluster, so dense layers of the usual size would weigh a
hundred times too much, both on the links (their gradients) and on the processor.

Letters: B samples per rank, F features, N embedding dim, D tower output dim, O tower outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from dmt_convert.model import (
    CodedModule,
    DmtModel,
    DmtSpec,
    Head,
    TowerCode,
    TowerModuleSpec,
    TowerSpec,
)
from dmt_convert.model.tower_code import FULL_LEVELS, HALF_LEVELS
from dmt_convert.model.tower_modules import DlrmTowerModule, LinearTowerModule
from dmt_convert.placement import Cluster, TowerPlan, plan_model
from dmt_convert.spec import (
    FeatureSpec,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    TableSpec,
    TowerAssignment,
)

from .settings import Settings, VariantName

NUM_BATCHES = 4
_TABLE_SPREAD = 0.05


def flat_spec(settings: Settings) -> ModelSpec:
    """The flat model: a table per feature, all alike."""
    names = [f"f{i}" for i in range(settings.features)]
    interaction = InteractionSpec(kind="dot")
    width = interaction.output_width([settings.dim] * (1 + settings.features))
    return ModelSpec(
        family="torchrec-dlrm",
        tables=tuple(
            TableSpec(name=f"t_{name}", rows=settings.rows, dim=settings.dim) for name in names
        ),
        features=tuple(FeatureSpec(name=name, table=f"t_{name}") for name in names),
        dense_arch=MlpSpec(
            widths=(settings.num_dense, *settings.dense_layers, settings.dim), final_relu=True
        ),
        interaction=interaction,
        over_arch=MlpSpec(widths=(width, *settings.over_layers, 1), final_relu=False),
    )


def split_features(settings: Settings) -> TowerAssignment:
    """One tower per host, of consecutive features; the first ones get what is left over."""
    names = [f"f{i}" for i in range(settings.features)]
    hosts = settings.topology.hosts
    small, more = divmod(len(names), hosts)
    sizes = [small + (tower < more) for tower in range(hosts)]
    remaining = iter(names)
    return TowerAssignment(
        towers=tuple(tuple(next(remaining) for _ in range(size)) for size in sizes)
    )


def dmt_spec(settings: Settings, name: VariantName) -> DmtSpec:
    """The converted model: its tower modules are what the variant's name says."""
    flat, assignment = flat_spec(settings), split_features(settings)
    widths = [settings.dim * len(tower) for tower in assignment.towers]
    modules = [_tower_module(settings, name, width) for width in widths]
    return DmtSpec(
        flat=flat,
        towers=tuple(
            TowerSpec(features=tower, module=module)
            for tower, module in zip(assignment.towers, modules, strict=True)
        ),
    )


def _tower_module(settings: Settings, name: VariantName, width: int) -> TowerModuleSpec:
    """The module of a tower whose embeddings have `width` elements."""
    if name.family == "coded":
        code, nbytes = TowerCode(precision="int8"), 4 * width // name.compression
        dim = nbytes
        if name.precision == "mixed":
            code = TowerCode(precision="int8", int4=2 * (nbytes // 3))
            dim = nbytes + code.int4 // 2
        kept = None if name.uncoded else code
        if name.is_linear:
            return TowerModuleSpec(kind="linear", dim=dim, code=kept)
        return TowerModuleSpec(kind="passthrough", code=kept)
    if name.compression == 1:
        return TowerModuleSpec(kind="passthrough")
    code = TowerCode(precision="int8") if name.precision == "int8" else None
    return TowerModuleSpec(kind="dlrm", c=1, dim=settings.dim // name.compression, code=code)


@torch.no_grad()
def set_code_ranges(settings: Settings, model: DmtModel) -> None:
    """Give every element that travels as a level the range that its first values fill.

    Embeddings are drawn from a normal distribution, so that of what a tower emits is known. 8 bits
    reach six standard deviations to either side; the 16 levels of 4 bits are spread over 2.7, where
    rounding and cutting off lose least.
    """
    drawn = _TABLE_SPREAD * settings.pooling**0.5
    for tower in model.tower_list:
        module = tower.tower_module
        code = module.code if isinstance(module, CodedModule) else None
        if code is None:
            continue
        spread = torch.full_like(code.low, drawn)
        if isinstance(module, LinearTowerModule):
            spread *= module.weight.norm(dim=1)
        elif isinstance(module, DlrmTowerModule):
            per_feature = module.feature_weight.unflatten(0, (-1, settings.dim))
            spread *= per_feature.norm(dim=1).flatten()
        whole = code.width - code.spec.int4
        reach, levels = torch.full_like(spread, 6.0), torch.full_like(spread, FULL_LEVELS - 1)
        reach[whole:], levels[whole:] = 2.7, HALF_LEVELS - 1
        code.low.copy_(-reach * spread)
        code.step.copy_(2 * reach * spread / levels)


def place_towers(settings: Settings, spec: DmtSpec) -> TowerPlan:
    """Tower t on host t, its tables over the host's ranks."""
    topology = settings.topology
    plan = plan_model(
        spec,
        Cluster(hosts=topology.hosts, ranks_per_host=topology.ranks_per_host),
        ids_per_bag=dict.fromkeys(spec.flat.feature_names, float(settings.pooling)),
    )
    assert plan.tower_order == tuple(range(topology.hosts)), plan.tower_hosts
    return plan


class DensePart(Head):
    """All but the tables and the tower modules: dense_arch, interaction, over_arch."""

    def forward(self, dense_BN: Tensor, emitted_BO: Tensor) -> Tensor:
        """Return logits, shape (B,).

        Args:
            dense_BN: The output of dense_arch.
            emitted_BO: The towers' outputs, or the flat model's pooled embeddings.
        """
        return self.finish(dense_BN, emitted_BO)


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """One rank's samples of one step."""

    dense: Tensor
    """Dense inputs, float32, shape (B, dense inputs)."""
    values: Tensor
    """Ids, int64: feature 0's bags, sample by sample, then feature 1's, ..."""
    lengths: Tensor
    """Ids per bag, int32, shape (F * B,), in the same order."""
    labels: Tensor
    """0 or 1, float32, shape (B,)."""
    upcoming: Batch = field(init=False, repr=False)
    """The batch of the same variant's next step, for engines that fetch ahead."""


def make_batches(settings: Settings, rank: int) -> list[Batch]:
    """Draw a rank's batches; each knows the one that follows, the last one the first."""
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + rank)
    count = settings.features * settings.batch
    batches = [
        Batch(
            dense=torch.randn(settings.batch, settings.num_dense, generator=generator),
            values=torch.randint(
                0, settings.rows, (count * settings.pooling,), generator=generator
            ),
            lengths=torch.full((count,), settings.pooling, dtype=torch.int32),
            labels=torch.randint(0, 2, (settings.batch,), generator=generator).float(),
        )
        for _ in range(NUM_BATCHES)
    ]
    for batch, following in zip(batches, [*batches[1:], batches[0]], strict=True):
        batch.upcoming = following
    return batches


def endless(batches: list[Batch]) -> Iterator[Batch]:
    """Yield the batches over and over."""
    return cycle(batches)


def whole_table(settings: Settings, name: str) -> Tensor:
    """The weights that a table starts from, the same for every variant, rank and sharding."""
    generator = torch.Generator().manual_seed(settings.seed + sum(name.encode()) * 7919)
    shape = (settings.rows, settings.dim)
    return torch.randn(shape, generator=generator).mul_(_TABLE_SPREAD)


@torch.no_grad()
def fill_tables(settings: Settings, state: Mapping[str, object]) -> None:
    """Write the tables' first weights into the local shards of a sharded model's state."""
    for name, value in state.items():
        if ".embedding_bags." not in name:
            continue
        table = name.split(".")[-2]
        assert hasattr(value, "local_shards"), f"{name} is a {type(value).__name__}"
        for shard in value.local_shards():
            (top, left), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            whole = whole_table(settings, table)
            shard.tensor.copy_(whole[top : top + rows, left : left + cols])
