"""A model and its tables in memory, ready to be trained.

Letters: B batch, N embedding dim, M widths' sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmt_convert.data import Batch
from dmt_convert.errors import ConfigError
from dmt_convert.model import DmtModel, FlatModel, TrainableTables, to_tensor
from dmt_convert.spec import ModelSpec
from dmt_convert.training.tables import TableStore


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableModel:
    """A converted or flat model whose lookups come from a store."""

    module: DmtModel | FlatModel
    """Gives everything but the lookups."""
    store: TableStore
    """The tables."""

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec: what the data must fit."""
        return self.store.spec

    def __call__(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        pooled = self.store.pool(batch)
        dense = to_tensor(batch.dense)
        if isinstance(self.module, FlatModel):
            return self.module.forward_pooled(dense, _join(pooled, self.spec.feature_names))
        emitted = [
            tower.tower_module(_join(pooled, tower.features)) for tower in self.module.tower_list
        ]
        return self.module.forward_emitted(dense, torch.cat(emitted, dim=1))

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained beside the tables, by name."""
        return {
            name: value
            for name, value in self.module.named_parameters()
            if not name.startswith("tables.")
            and not (name.startswith("towers.") and ".tables." in name)
        }


def _join(pooled: dict[str, Tensor], features: Iterable[str]) -> Tensor:
    """Pooled embeddings side by side, shape (B, M)."""
    return torch.cat([pooled[name] for name in features], dim=1)


def make_trainable(module: DmtModel | FlatModel) -> TrainableModel:
    """Take over a model whose tables are in memory; it stays usable, and changes as it is trained.

    The tables move into a store, and the model's `TrainableTables` become views of it. Where two
    towers have a copy each of a table that they share, the first is taken for both.

    Args:
        module: The model.

    Raises:
        ConfigError: Its tables are not in memory.
    """
    spec = module.spec.flat if isinstance(module, DmtModel) else module.spec
    parts = [part for part in module.modules() if isinstance(part, TrainableTables)]
    bags = [(name, bag) for part in parts for name, bag in part.items()]
    missing = {table.name for table in spec.tables} - {name for name, _ in bags}
    if missing:
        raise ConfigError(
            f"{len(missing)} of the model's tables are not in memory",
            expected="a model made with `TrainableTables`, which is the default",
            hint="open a bundle with `dmt_convert.training.load_bundle`",
        )
    store = TableStore(spec)
    taken = set()
    for name, bag in bags:
        assert isinstance(bag, nn.EmbeddingBag)
        view = store.table(name)
        if name not in taken:
            view.copy_(bag.weight.detach())
            taken.add(name)
        bag.weight.data = view
    return TrainableModel(module=module, store=store)
