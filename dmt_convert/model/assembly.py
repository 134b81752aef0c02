"""The model, put together: lookup, tower module, exchange, head.

This is the one place that does so. Scoring and training in one process use `FlatModel` and
`DmtModel` as they are; ranks take over a `DmtModel`'s tower modules and use it as their `Head`
(`dmt_convert.cluster`); exports trace the same tower modules and the same `Head`.

Letters: B batch, D dense inputs, N width of the dense vector, M sum of the embedding dims, O
elements that all towers emit, P elements that arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from dmt_convert.data import Bag, Batch
from dmt_convert.model.dmt_spec import DmtSpec, one_tower
from dmt_convert.model.interaction_modules import DotInteraction
from dmt_convert.model.layers import Mlp
from dmt_convert.model.table_lookup import TrainableTables, to_tensor
from dmt_convert.model.tower_kinds import TowerModuleSpec
from dmt_convert.spec import InteractionSpec, ModelSpec

Stages = Iterator[tuple[str, Tensor]]


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
        self.tower_module = tower.module.rules.build(tower.module, spec.tower_dims(index))

    def pool(self, bags: Sequence[Bag]) -> list[Tensor]:
        """Return the pooled embeddings of the tower's features, each (B, N_f)."""
        return [self.tables(name, bag) for name, bag in zip(self.features, bags, strict=True)]

    def emit(self, pooled: Mapping[str, Tensor]) -> Tensor:
        """Map pooled embeddings by feature to what the tower sends to all hosts, (B, O_t)."""
        joined = torch.cat([pooled[name] for name in self.features], dim=1)
        emitted: Tensor = self.tower_module(joined)
        return emitted

    def forward(self, bags: Sequence[Bag]) -> Tensor:
        """Return what the tower sends to all hosts, shape (B, O_t)."""
        return self.emit(dict(zip(self.features, self.pool(bags), strict=True)))


class Restore(nn.ModuleList):
    """Per tower, a linear map from what arrived of it back to its embeddings.

    Towers on every rank have the identity: their embeddings arrive as they are.

    Args:
        spec: The converted model, whose tower modules are undone by the receiver.
    """

    def __init__(self, spec: DmtSpec) -> None:
        self.widths = list(spec.tower_widths)
        super().__init__(
            nn.Identity() if tower.everywhere else nn.Linear(width, sum(dims))
            for tower, width, dims in zip(
                spec.towers, spec.tower_widths, spec.dims_by_tower, strict=True
            )
        )

    def forward(self, emitted_BO: Tensor) -> Tensor:
        """Map (B, O) to (B, M), towers side by side."""
        parts = torch.split(emitted_BO, self.widths, dim=1)
        return torch.cat([layer(x) for layer, x in zip(self, parts, strict=True)], dim=1)


class Head(nn.Module):
    """What is behind the exchange: dense_arch, interaction, over_arch.

    Args:
        spec: The model; a flat one as one passthrough tower.
        lookups: Modules in front of the head. They are registered first, so that weights are drawn
            and stored in the order of the computation.
    """

    arrange: Tensor
    """Column of what arrives (restored, if it is) for every column that the interaction takes; the
    column behind the last one stands for zeros. Empty: the columns as they are."""
    order: Tensor
    """Column of what arrives for every column that `restore` takes. Empty: as they are."""

    def __init__(self, spec: DmtSpec, **lookups: nn.Module) -> None:
        super().__init__()
        for name, module in lookups.items():
            self.add_module(name, module)
        dense = spec.flat.input_dims[0]
        self.dense_arch = Mlp(spec.flat.dense_arch)
        self.dense_projection = (
            nn.Linear(dense, spec.dense_dim) if spec.dense_dim != dense else None
        )
        self.restore = Restore(spec) if spec.rules.restores else None
        self.interaction = spec.interaction.rules.build(spec.interaction, spec.interaction_dims)
        self.over_arch = Mlp(spec.over_arch)
        arrange, width = _arrangement(spec)
        self._is_filled = width in arrange
        self.register_buffer("arrange", _unless_in_order(arrange, width), persistent=False)
        self.register_buffer("order", arrange[:0], persistent=False)

    def expect_columns(self, columns: Sequence[int]) -> None:
        """Prepare for an exchange that does not deliver the columns in the towers' order.

        Args:
            columns: For every column that arrives, its place in the towers' joint output, towers
                and their vectors in the spec's order.
        """
        device, width = self.arrange.device, len(columns)
        places = torch.argsort(torch.tensor(columns, device="cpu"))
        if self.restore is not None:
            self.order = _unless_in_order(places, width).to(device)
            return
        if self.arrange.numel():  # one selection of columns instead of two
            zeros = torch.tensor([width], device="cpu")
            places = torch.cat([places, zeros])[self.arrange.cpu()]
        self.arrange = _unless_in_order(places, width).to(device)

    def forward_emitted(self, dense_BD: Tensor, emitted_BP: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense inputs and what all towers emitted."""
        return self.finish(self.dense_arch(dense_BD), emitted_BP)

    def finish(self, dense_BN: Tensor, emitted_BP: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense_arch's output and what all towers emitted."""
        if not _keeps_values(dense_BN) and self._is_wide(len(dense_BN)):
            return self.over_arch.finish(self.pre_activations(dense_BN, emitted_BP)).squeeze(1)
        logits: Tensor = self.over_arch(self.interact(dense_BN, emitted_BP))
        return logits.squeeze(1)

    def pre_activations(self, dense_BN: Tensor, emitted_BP: Tensor) -> Tensor:
        """Return over_arch's first layer before its ReLU, (B, H); a network's logit, (B, 1).

        If the interaction pairs very many vectors, their products are never held all at once.
        """
        if not len(self.over_arch):
            return self.interact(dense_BN, emitted_BP)
        layer = self.over_arch[0]
        assert isinstance(layer, nn.Linear)
        if self._is_wide(len(dense_BN)):
            assert isinstance(self.interaction, DotInteraction)
            return self.interaction.map_output(layer, *self._meet(dense_BN, emitted_BP))
        mapped: Tensor = layer(self.interact(dense_BN, emitted_BP))
        return mapped

    def _is_wide(self, batch: int) -> bool:
        dots = self.interaction
        return isinstance(dots, DotInteraction) and dots.pairs.is_wide(batch)

    def interact(self, dense_BN: Tensor, emitted_BP: Tensor) -> Tensor:
        """Return what over_arch takes, shape (B, width).

        If the dense part is the flat model's, the embeddings are first restored and brought back
        into the flat order, so that every sum is taken in the order in which the flat model takes
        it. Vectors for dot products are filled up to one width.
        """
        interacted: Tensor = self.interaction(*self._meet(dense_BN, emitted_BP))
        return interacted

    def _meet(self, dense_BN: Tensor, emitted_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the interaction takes."""
        if self.restore is not None:
            if self.order.numel():
                emitted_BP = emitted_BP.index_select(1, self.order)
            emitted_BP = self.restore(emitted_BP)
        if self.arrange.numel():
            if self._is_filled:
                emitted_BP = nn.functional.pad(emitted_BP, (0, 1))
            emitted_BP = emitted_BP.index_select(1, self.arrange)
        part = dense_BN if self.dense_projection is None else self.dense_projection(dense_BN)
        return part, emitted_BP, dense_BN

    def head_stages(self, dense_BD: Tensor, emitted_BP: Tensor) -> Stages:
        """Yield what the head computes: the output of every part, the logit last."""
        dense_BN = self.dense_arch(dense_BD)
        yield "dense_arch", dense_BN
        x = self.interact(dense_BN, emitted_BP)
        yield "interaction", x
        if not len(self.over_arch):  # a network gives the logit itself
            yield "logit", x.squeeze(1)
        for i, layer in enumerate(self.over_arch):
            x = layer(x)
            last = i == len(self.over_arch) - 1
            yield "logit" if last else f"over_arch layer {i}", x.squeeze(1) if last else x
            x = torch.relu(x)


class FlatModel(Head):
    """The flat model: tables, and a head over all pooled embeddings.

    Args:
        spec: The model.
        tables: Pooled lookups; trainable tables in memory by default.
    """

    tables: nn.Module

    def __init__(self, spec: ModelSpec, tables: nn.Module | None = None) -> None:
        super().__init__(
            one_tower(spec), tables=TrainableTables(spec) if tables is None else tables
        )
        self.spec = spec

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        return self.forward_vectors(to_tensor(batch.dense), dict(self._pool(batch)))

    def forward_vectors(self, dense_BD: Tensor, pooled: Mapping[str, Tensor]) -> Tensor:
        """Return logits, shape (B,), from dense inputs and every feature's pooled embedding."""
        return self.forward_emitted(dense_BD, self._join(pooled))

    def forward_pooled(self, dense_BD: Tensor, pooled_BM: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense inputs and pooled embeddings side by side."""
        return self.forward_emitted(dense_BD, pooled_BM)

    def stages(self, batch: Batch) -> Stages:
        """Yield every intermediate result in the order in which it comes to be."""
        pooled = {}
        for name, vector in self._pool(batch):
            pooled[name] = vector
            yield f"pooled embedding of {name}", vector
        yield from self.head_stages(to_tensor(batch.dense), self._join(pooled))

    def _pool(self, batch: Batch) -> Stages:
        for name, bag in zip(batch.feature_names, batch.bags, strict=True):
            yield name, self.tables(name, bag)

    def _join(self, pooled: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([pooled[name] for name in self.spec.feature_names], dim=1)


class DmtModel(Head):
    """The converted model: towers, and a head over what they emit.

    Args:
        spec: The converted model.
        tables: Pooled lookups of every tower; trainable tables in memory by default.
    """

    towers: nn.ModuleList

    def __init__(self, spec: DmtSpec, tables: Sequence[nn.Module] | None = None) -> None:
        towers = nn.ModuleList(
            Tower(spec, t, None if tables is None else tables[t]) for t in range(len(spec.towers))
        )
        super().__init__(spec, towers=towers)
        self.spec = spec

    @property
    def tower_list(self) -> list[Tower]:
        """The towers, typed."""
        return [tower for tower in self.towers if isinstance(tower, Tower)]

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        bags = dict(zip(batch.feature_names, batch.bags, strict=True))
        emitted = [tower([bags[name] for name in tower.features]) for tower in self.tower_list]
        return self.forward_emitted(to_tensor(batch.dense), torch.cat(emitted, dim=1))

    def forward_vectors(self, dense_BD: Tensor, pooled: Mapping[str, Tensor]) -> Tensor:
        """Return logits, shape (B,), from dense inputs and every feature's pooled embedding."""
        emitted = [tower.emit(pooled) for tower in self.tower_list]
        return self.forward_emitted(dense_BD, torch.cat(emitted, dim=1))

    def forward_pooled(self, dense_BD: Tensor, pooled_BM: Tensor) -> Tensor:
        """Return logits, shape (B,), from dense inputs and pooled embeddings in flat order."""
        return self.forward_emitted(dense_BD, self.emit(pooled_BM))

    def emit(self, pooled_BM: Tensor) -> Tensor:
        """Apply the tower modules to pooled embeddings in flat order: (B, M) to (B, O)."""
        dims = list(self.spec.flat.feature_dims)
        vectors = torch.split(pooled_BM, dims, dim=1)
        pooled = dict(zip(self.spec.flat.feature_names, vectors, strict=True))
        return torch.cat([tower.emit(pooled) for tower in self.tower_list], dim=1)

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
            emitted.append(tower.emit(pooled))
            yield f"output of tower {t}", emitted[-1]
        yield from self.head_stages(to_tensor(batch.dense), torch.cat(emitted, dim=1))


def _arrangement(spec: DmtSpec) -> tuple[Tensor, int]:
    """Return the first value of `Head.arrange`, in full, and the number of columns it selects from.

    That is the towers' joint output, restored if it is to be.
    """
    if spec.keeps_network:
        columns = [column for tower in spec.columns_by_tower for column in tower]
        return torch.argsort(torch.tensor(columns, device="cpu")), len(columns)
    dims = spec.emitted_dims
    starts = torch.tensor([0, *dims], device="cpu").cumsum(0)
    wanted = torch.tensor(spec.interaction_dims[1:], device="cpu")
    position = torch.arange(int(wanted.max()), device="cpu")
    filled = torch.where(
        position < torch.tensor(dims, device="cpu")[:, None],
        starts[:-1, None] + position,
        starts[-1],
    )
    return filled[position < wanted[:, None]], sum(dims)


def _keeps_values(value: Tensor) -> bool:
    """Whether intermediate results have to stay: for a gradient, or for a graph that is traced."""
    traced = torch.compiler.is_compiling() or type(value) is not Tensor
    return traced or torch.is_grad_enabled()


def _unless_in_order(columns: Tensor, width: int) -> Tensor:
    """Return an empty selection instead of one that selects all columns in their order."""
    is_all = len(columns) == width and bool((columns == torch.arange(width, device="cpu")).all())
    return columns[:0] if is_all else columns


@cache
def count_parameters(spec: InteractionSpec | TowerModuleSpec, dims: tuple[int, ...]) -> int:
    """Count the parameters of an interaction or a tower module; `dims` are its inputs' widths."""
    with torch.device("meta"):
        module = spec.rules.build(spec, dims)  # type: ignore[arg-type]
    return sum(value.numel() for value in module.parameters())
