"""Tiny models for the scenarios of ranks: specs, plans, weights and batches, all from a `Case`.

Letters: F features, G rows of a global batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmt_convert.cluster import ShardedModel, table_shards
from dmt_convert.data import Bag, Batch
from dmt_convert.data.batch import take_rows
from dmt_convert.model import DmtModel, DmtSpec, TowerCode, TowerModuleSpec, TowerSpec
from dmt_convert.model.networks import registry
from dmt_convert.placement import Cluster, TowerPlan, plan_model
from dmt_convert.spec import (
    FeatureSpec,
    InteractionSpec,
    MlpSpec,
    ModelSpec,
    NetworkSpec,
    TableSpec,
    network_model,
)

NUM_DENSE = 5


class Network(nn.Module):
    """Batch norm and dropout, which training leaves off; maybe a layer that is not used."""

    def __init__(self, config: Mapping[str, bool], dims: Sequence[int], num_dense: int) -> None:
        super().__init__()
        width = num_dense + sum(dims)
        self.norm = nn.BatchNorm1d(width)
        self.norm.running_var.fill_(0.5)  # type: ignore[union-attr, operator]
        self.hidden, self.last = nn.Linear(width, 8), nn.Linear(8, 1)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(3, 3) if config["unused"] else None

    def forward(self, dense: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Return logits, shape (B,)."""
        x = self.norm(torch.cat((dense, *pooled), dim=1))
        logits: Tensor = self.last(torch.tanh(self.hidden(self.drop(x))))
        return logits.squeeze(1)


registry.NETWORKS = {"test": Network}  # type: ignore[misc]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    towers: list[list[list[int]]]
    """Rows and dim of every table, by tower."""
    shared: list[int]
    """Indices of tables that two features look up."""
    interaction: str
    """dot, cat, dcn or network."""
    pooling: str
    """sum or mean."""
    ids: str
    """single: one id per bag; multi: none to three; rare: hardly any, for many ranks none at all;
    distinct: none to three, and no id twice in a global batch, so that no gradients of a row are
    summed."""
    weights: bool
    """Whether the data have weights."""
    hbm_bytes: int
    """Memory of a rank; little of it makes the planner cut tables."""
    optimizer: str
    """The tables' optimizer."""
    modules: list[dict[str, Any]]
    """Every tower's module; one for all, or one each."""
    steps: int
    """Steps to take."""
    rows_per_rank: int
    """G / W."""
    table_lr: float
    """The tables' learning rate."""
    dense_lr: float
    """Everything else's."""
    everywhere: list[int]
    """Indices of towers whose tables every rank holds."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Case:
        """Fill in what a test does not care about."""
        usual = {
            "shared": [],
            "interaction": "dot",
            "pooling": "sum",
            "ids": "multi",
            "weights": False,
            "hbm_bytes": 10**9,
            "optimizer": "sgd",
            "modules": [{"kind": "passthrough"}],
            "steps": 20,
            "rows_per_rank": 4,
            "table_lr": 0.5,
            "dense_lr": 0.1,
            "everywhere": [],
        }
        return cls(**(usual | value))

    def spec(self) -> ModelSpec:
        """The flat model; its features are dealt to towers in turn."""
        shapes = [(shape, t) for t, tower in enumerate(self.towers) for shape in tower]
        names = [f"t{i}" for i in range(len(shapes))]
        turn = sorted(range(len(shapes)), key=lambda i: (i * 7 % len(shapes), i))
        features = [
            FeatureSpec(name=name, table=names[i], pooling=self.pooling)  # type: ignore[arg-type]
            for i in turn
            for name in [f"f{i}"] + [f"g{i}"] * (i in self.shared)
        ]
        tables = tuple(
            TableSpec(name=name, rows=rows, dim=dim)
            for name, ((rows, dim), _) in zip(names, shapes, strict=True)
        )
        if self.interaction == "network":
            return network_model(
                family="test",
                tables=tables,
                features=features,
                num_dense=NUM_DENSE,
                # plain TorchRec, which passthrough is held against, refuses unused parameters
                network=NetworkSpec(
                    name="test", config={"unused": self.modules[0]["kind"] != "passthrough"}
                ),
            )
        dims = [dim for (_, dim), _ in shapes]
        dense_dim = 8 if self.interaction == "cat" else dims[0]
        inputs = (dense_dim, *(dims[int(f.table[1:])] for f in features))
        interaction = (
            InteractionSpec(kind="dcn", cross_layers=2, cross_rank=4)
            if self.interaction == "dcn"
            else InteractionSpec(kind=self.interaction)  # type: ignore[arg-type]
        )
        return ModelSpec(
            family="torchrec-dlrm",
            tables=tables,
            features=tuple(features),
            dense_arch=MlpSpec(widths=(NUM_DENSE, 12, dense_dim), final_relu=True),
            interaction=interaction,
            over_arch=MlpSpec(widths=(interaction.output_width(inputs), 8, 1), final_relu=False),
        )

    def dmt_spec(self) -> DmtSpec:
        """The converted model."""
        spec, first, towers = self.spec(), 0, []
        for t, tower in enumerate(self.towers):
            names = {f"t{i}" for i in range(first, first + len(tower))}
            first += len(tower)
            given = dict(self.modules[t % len(self.modules)])
            code = given.pop("code", None)
            module = TowerModuleSpec(**given, code=TowerCode(**code) if code else None)
            features = [f.name for f in spec.features if f.table in names]
            # the tower's own order is not the model's
            local = t in self.everywhere
            own = TowerModuleSpec(kind="passthrough") if local else module
            tower = TowerSpec(features=tuple(reversed(features)), module=own, everywhere=local)
            towers.append(tower)
        return DmtSpec(flat=spec, towers=tuple(towers))

    def plan(self, hosts: int, ranks_per_host: int) -> TowerPlan:
        """Where its towers go."""
        model = self.dmt_spec()
        cluster = Cluster(hosts=hosts, ranks_per_host=ranks_per_host, hbm_bytes=self.hbm_bytes)
        return plan_model(model, cluster)

    def model(self) -> DmtModel:
        """The model with the weights that all start from."""
        torch.manual_seed(1)
        model = DmtModel(self.dmt_spec())
        with torch.no_grad():
            for tower in model.tower_list:
                for table in tower.tables.values():  # type: ignore[operator]
                    table.weight.uniform_(-0.5, 0.5)
            if any(module.get("code") for module in self.modules):
                fit_ranges(model, self.batch(0, 64))
        return model

    def batch(self, step: int, num_rows: int) -> Batch:
        """The global batch of a step."""
        rng, spec = np.random.default_rng(step), self.spec()
        unused = {table.name: rng.permutation(table.rows) for table in spec.tables}
        bags = []
        for feature in spec.features:
            lengths = np.ones(num_rows, dtype=np.int64)
            if self.ids != "single":
                lengths = rng.integers(0, 4, num_rows)
                lengths[rng.integers(num_rows)] = 0
            if self.ids == "rare":
                lengths[rng.random(num_rows) < 0.9] = 0
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            count, rows = int(offsets[-1]), spec.table(feature.table).rows
            values = rng.integers(0, rows, count)
            if self.ids == "distinct":
                values, unused[feature.table] = np.split(unused[feature.table], [count])
                assert len(values) == count, f"{feature.table} has too few rows"
            weights = rng.random(count).astype(np.float32) if self.weights else None
            bags.append(Bag(values=values, offsets=offsets, weights=weights))
        return Batch(
            dense=rng.standard_normal((num_rows, NUM_DENSE)).astype(np.float32),
            feature_names=spec.feature_names,
            bags=tuple(bags),
            labels=rng.integers(0, 2, num_rows).astype(np.float32),
        )

    def global_batch(self, step: int) -> Batch:
        """The global batch over the ranks that are there."""
        return self.batch(step, self.rows_per_rank * dist.get_world_size())

    def own_batch(self, step: int) -> Batch:
        """This rank's rows of it."""
        first = self.rows_per_rank * dist.get_rank()
        return take_rows(self.global_batch(step), slice(first, first + self.rows_per_rank))


def fit_ranges(model: DmtModel, batch: Batch) -> None:
    """Give codes the ranges of what is emitted for a batch."""
    bags = dict(zip(batch.feature_names, batch.bags, strict=True))
    for tower in model.tower_list:
        code = getattr(tower.tower_module, "code", None)
        if code is None or code.spec.precision != "int8":
            continue
        pooled = torch.cat(tower.pool([bags[name] for name in tower.features]), dim=1)
        emitted = tower.tower_module.emit(pooled)  # type: ignore[operator]
        levels = torch.full((code.width,), 254.0)
        levels[code.width - code.spec.int4 :] = 15.0
        code.low.copy_(emitted.amin(dim=0))
        code.step.copy_((emitted.amax(dim=0) - emitted.amin(dim=0)) / levels)


def whole_tables(model: DmtModel) -> dict[str, Tensor]:
    """Table -> a copy of its weights."""
    return {
        name: table.weight.detach().clone()
        for tower in model.tower_list
        for name, table in tower.tables.items()  # type: ignore[operator]
    }


def own_shards(sharded: ShardedModel) -> list[tuple[str, int, int, Tensor]]:
    """This rank's shards, those that every rank holds on the first one alone."""
    return [
        shard
        for shard in table_shards(sharded)
        if dist.get_rank() == 0 or shard[0] not in sharded.replicated
    ]


def join_shards(
    shapes: dict[str, tuple[int, ...]], shards: list[tuple[str, int, int, Tensor]]
) -> dict[str, Tensor]:
    """Bring all ranks' shards together, the same on all; each element has to lie on one rank."""
    joined = {}
    for name, shape in shapes.items():
        whole, seen = torch.zeros(shape), torch.zeros(shape)
        for table, top, left, part in shards:
            if table == name:
                rows, cols = part.shape
                whole[top : top + rows, left : left + cols] = part.detach()
                seen[top : top + rows, left : left + cols] += 1
        dist.all_reduce(whole)  # one term and zeros: exact
        dist.all_reduce(seen)
        assert bool((seen == 1).all()), f"{name} is not tiled by its shards"
        joined[name] = whole
    return joined


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert mine.keys() == theirs.keys(), (sorted(mine), sorted(theirs))
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
