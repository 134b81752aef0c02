"""The converted model as a plain torch module.

Letters: B batch, N embedding dim, M widths' sum, O tower output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmt_convert.data import Bag, Batch
from dmt_convert.model.dense_parts import Interaction, Mlp
from dmt_convert.model.dmt_spec import DmtSpec
from dmt_convert.model.flat_model import Stages, over_arch_stages
from dmt_convert.model.table_lookup import TrainableTables, to_tensor
from dmt_convert.model.tower_module import build_tower_module


class Tower(nn.Module):
    """The tables of some features, and the module over them.

    Args:
        spec: The converted model.
        index: Which of its towers.
        tables: Pooled lookups; trainable tables in memory by default.
    """

    def __init__(self, spec: DmtSpec, index: int, tables: nn.Module | None = None) -> None:
        super().__init__()
        tower = spec.towers[index]
        self.features = tower.features
        self.tables = TrainableTables(spec.flat, tower.features) if tables is None else tables
        self.tower_module = build_tower_module(tower.module, spec.tower_dims(index))

    def pool(self, bags: Sequence[Bag]) -> list[Tensor]:
        """Return the pooled embeddings of the tower's features, each (B, N)."""
        return [self.tables(name, bag) for name, bag in zip(self.features, bags, strict=True)]

    def forward(self, bags: Sequence[Bag]) -> Tensor:
        """Return what the tower sends to all hosts, shape (B, O)."""
        emitted: Tensor = self.tower_module(torch.cat(self.pool(bags), dim=1))
        return emitted


class Restore(nn.ModuleList):
    """Per tower, a linear map from what it emitted back to its embeddings: D_t to M_t.

    Args:
        spec: The converted model, of linear tower modules.
    """

    def __init__(self, spec: DmtSpec) -> None:
        self.widths = list(spec.tower_widths)
        super().__init__(
            nn.Linear(tower.module.dim, sum(dims))
            for tower, dims in zip(spec.towers, spec.dims_by_tower, strict=True)
        )

    def forward(self, emitted_BO: Tensor) -> Tensor:
        """Map (B, sum D_t) to (B, M), towers side by side."""
        parts = torch.split(emitted_BO, self.widths, dim=1)
        return torch.cat([layer(x) for layer, x in zip(self, parts, strict=True)], dim=1)


class DmtModel(nn.Module):
    """dense_arch, towers, interaction over what the towers emit, over_arch: one logit per row.

    Args:
        spec: The converted model.
        tables: Pooled lookups of every tower; trainable tables in memory by default.
    """

    arrange: Tensor

    def __init__(self, spec: DmtSpec, tables: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.towers = nn.ModuleList(
            Tower(spec, t, None if tables is None else tables[t]) for t in range(len(spec.towers))
        )
        self.dense_arch = Mlp(spec.flat.dense_arch)
        dense = spec.flat.input_dims[0]
        self.dense_projection = (
            nn.Linear(dense, spec.dense_dim) if spec.dense_dim != dense else None
        )
        self.restore = Restore(spec) if spec.kind == "linear" else None
        self.interaction = Interaction(spec.interaction, spec.interaction_dims)
        self.over_arch = Mlp(spec.over_arch)
        self.register_buffer("arrange", _arrangement(spec), persistent=False)

    @property
    def tower_list(self) -> list[Tower]:
        """The towers, typed."""
        return [tower for tower in self.towers if isinstance(tower, Tower)]

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        emitted = [tower([bags[name] for name in tower.features]) for tower in self.tower_list]
        return self.forward_emitted(to_tensor(batch.dense), torch.cat(emitted, dim=1))

    def forward_pooled(self, dense_BD: Tensor, pooled_BM: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense inputs and pooled embeddings in flat order."""
        return self.forward_emitted(dense_BD, self.emit(pooled_BM))

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Apply the tower modules to pooled embeddings in flat order: (B, M) to (B, sum O)."""
        columns = _columns(self.spec)
        return torch.cat(
            [
                tower.tower_module(pooled_BM[:, columns[t]])
                for t, tower in enumerate(self.tower_list)
            ],
            dim=1,
        )

    def forward_emitted(self, dense_BD: Tensor, emitted_BO: Tensor) -> Tensor:
        """Return logits, shape (B,), from what all towers emitted."""
        logits: Tensor = self.over_arch(self.interact(self.dense_arch(dense_BD), emitted_BO))
        return logits.squeeze(1)

    def interact(self, dense_BN: Tensor, emitted_BO: Tensor) -> Tensor:
        """Return what over_arch takes, shape (B, width).

        Where the network is the flat model's, the embeddings are first restored and brought back
        into the flat order, so that every sum is taken in the order in which the flat model takes
        it. Vectors for dot products are filled up to one width.
        """
        if self.restore is not None:
            emitted_BO = self.restore(emitted_BO)
        if self.arrange.numel():
            if not self.spec.keeps_network:
                emitted_BO = nn.functional.pad(emitted_BO, (0, 1))
            emitted_BO = emitted_BO[:, self.arrange]
        part = dense_BN if self.dense_projection is None else self.dense_projection(dense_BN)
        interacted: Tensor = self.interaction(part, emitted_BO, dense_BN)
        return interacted

    def stages(self, batch: Batch) -> Stages:
        """Yield every intermediate result; pooled embeddings in the flat model's order."""
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        pooled: dict[str, Tensor] = {}
        for tower in self.tower_list:
            vectors = tower.pool([bags[name] for name in tower.features])
            pooled.update(zip(tower.features, vectors, strict=True))
        for name in self.spec.flat.feature_names:
            yield f"pooled embedding of {name}", pooled[name]
        emitted = []
        for t, tower in enumerate(self.tower_list):
            joined = torch.cat([pooled[name] for name in tower.features], dim=1)
            emitted.append(tower.tower_module(joined))
            yield f"output of tower {t}", emitted[-1]
        dense_BN = self.dense_arch(to_tensor(batch.dense))
        yield "dense_arch", dense_BN
        x = self.interact(dense_BN, torch.cat(emitted, dim=1))
        yield "interaction", x
        yield from over_arch_stages(self.over_arch, x)


def _columns(spec: DmtSpec) -> list[Tensor]:
    """Columns of the flat pooled matrix that every tower holds, in the tower's order."""
    starts: dict[str, tuple[int, int]] = {}
    position = 0
    for name, dim in zip(spec.flat.feature_names, spec.flat.feature_dims, strict=True):
        starts[name] = (position, dim)
        position += dim
    return [
        torch.cat(
            [torch.arange(a, a + n, device="cpu") for a, n in map(starts.__getitem__, t.features)]
        )
        for t in spec.towers
    ]


def _arrangement(spec: DmtSpec) -> Tensor:
    """Column of the towers' joint (restored) output for every column that the interaction takes.

    Empty where they are the same. The column behind the last one holds zeros.
    """
    if spec.keeps_network:
        return torch.argsort(torch.cat(_columns(spec)))
    dims = spec.emitted_dims
    if spec.interaction.kind != "dot" or len(set(dims)) == 1:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    starts = torch.tensor([0, *dims], device="cpu").cumsum(0)
    position = torch.arange(spec.dense_dim, device="cpu")
    filled = position < torch.tensor(dims, device="cpu")[:, None]
    return torch.where(filled, starts[:-1, None] + position, starts[-1]).reshape(-1)
