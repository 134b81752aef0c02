"""Tables that every rank holds, and what moves them.

They are plain torch: their gradients are averaged over the ranks by DistributedDataParallel, with
those of the dense parts, and then moved by an optimizer of their own, by the rule that is fused
into the tables of towers. TorchRec's own data-parallel tables would need the same optimizer, for
its fused one ignores them without a word, and one more collective per step.

Letters: B samples of one rank, R rows of a table, N its columns, M widths' sum of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.index_route import FeatureOrder
from dmt_convert.cluster.transport import Transport
from dmt_convert.config import TableOptimizerKind
from dmt_convert.errors import ConfigError
from dmt_convert.model import DmtSpec

EPSILON: Final = 1e-8
"""Added to the root of squared gradients, here and in what is fused into tables."""
REPLICATED: Final = "replicated"
"""Where these tables are in a `ClusterModel`."""


class ReplicatedTables(nn.Module):
    """Looks up a rank's own samples, and exchanges nothing.

    Args:
        spec: The model; its towers on every rank are looked up.
        transport: Says where the tables lie; they are left to be filled.
    """

    def __init__(self, spec: DmtSpec, transport: Transport) -> None:
        super().__init__()
        self._transport = transport
        self._features: list[tuple[str, str]] = []
        self.columns: list[int] = []
        """Columns of all towers' joint output that come out, in their order."""
        tables = spec.flat.tables_by_feature
        self.embedding_bags = nn.ModuleDict()
        first = 0
        for tower, width in zip(spec.towers, spec.tower_widths, strict=True):
            if tower.everywhere:
                self.columns += range(first, first + width)
                self._features += [(name, tables[name].name) for name in tower.features]
            first += width
        self._pick = FeatureOrder([name for name, _ in self._features])
        for table in spec.flat.tables:
            if any(table.name == used for _, used in self._features):
                self.embedding_bags[table.name] = nn.EmbeddingBag(
                    table.rows,
                    table.dim,
                    mode="sum",
                    include_last_offset=True,
                    device=transport.device,
                )

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the pooled embeddings of these features, shape (B, M).

        Args:
            sparse: Ids of all features, in host memory.
        """
        ids, put = self._pick(sparse), self._transport.put
        lengths = ids.lengths().view(len(self._features), -1)
        ends = lengths.cumsum(1, dtype=torch.int64)
        counts = ends[:, -1].tolist()
        offsets = put(nn.functional.pad(ends, (1, 0)))
        values = torch.split(put(ids.values()), counts)
        weights = ids.weights_or_none()
        scales = [None] * len(counts) if weights is None else torch.split(put(weights), counts)
        pooled = [
            self.embedding_bags[table](values[i], offsets[i], scales[i])
            for i, (_, table) in enumerate(self._features)
        ]
        return torch.cat(pooled, dim=1)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Table -> its rows, shape (R, N)."""
        return {name: cast("nn.Parameter", bag.weight) for name, bag in self.embedding_bags.items()}


class ReplicatedOptimizer:
    """Moves tables by their averaged gradients; on all ranks alike, so that they stay the same.

    Args:
        weights: Table -> its rows; may be empty.
        kind: The rule.

    Raises:
        ConfigError: The rule is Adam.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], kind: TableOptimizerKind) -> None:
        if weights and kind == "adam":
            raise ConfigError(
                "tables on every rank moved by adam",
                expected="rowwise-adagrad, adagrad or sgd: a gradient that was summed over the "
                "ranks does not say which rows were looked up, and adam moves only those",
                hint="use --table-optimizer rowwise-adagrad, or convert with --replicate none",
            )
        self._weights, self._kind, self.lr = dict(weights), kind, 0.0
        self.sums: dict[str, Tensor] = {}
        """Adagrad: table -> its sums of squared gradients, shape (R,) if row-wise, else (R, N)."""
        for name, weight in self._weights.items():
            if kind == "rowwise-adagrad":
                self.sums[name] = torch.zeros(len(weight), device=weight.device)
            elif kind == "adagrad":
                self.sums[name] = torch.zeros_like(weight, requires_grad=False)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for weight in self._weights.values():
            if weight.grad is not None:
                weight.grad.zero_()  # in place: it is a view of what is summed over the ranks

    @torch.no_grad()
    def step(self) -> None:
        """Add up squared gradients, and move by the learning rate."""
        for name, weight in self._weights.items():
            gradient = weight.grad
            assert gradient is not None, f"table {name!r} has no gradient"
            if self._kind == "sgd":
                weight.sub_(gradient, alpha=self.lr)
                continue
            squared, sums = gradient.square(), self.sums[name]
            if self._kind == "rowwise-adagrad":
                sums.add_(squared.mean(dim=1))
                scale = (self.lr / sums.sqrt().add_(EPSILON)).unsqueeze(1)
            else:
                scale = self.lr / sums.add_(squared).sqrt().add_(EPSILON)
            weight.sub_(gradient * scale)
