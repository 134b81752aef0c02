"""A model and its tables in memory, ready to be trained."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Computes everything but the lookups."""
    store: TableStore
    """The tables."""

    @property
    def spec(self) -> ModelSpec:
        """The flat model's spec: what the data must fit."""
        return self.store.spec

    def __call__(self, batch: Batch) -> Tensor:
        """Return logits, shape (B,)."""
        return self.module.forward_vectors(to_tensor(batch.dense), self.store.pool(batch))

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained beside the tables, by name."""
        return {
            name: value
            for name, value in self.module.named_parameters()
            if not name.startswith("tables.")
            and not (name.startswith("towers.") and ".tables." in name)
        }


def make_trainable(module: DmtModel | FlatModel) -> TrainableModel:
    """Take over a model whose tables are in memory. It stays usable and changes during training.

    The tables move into a store, and the model's `TrainableTables` become views of it. If two
    towers share a table and each has a copy, both get the first copy.

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
