"""The exchange of indices in one hop: every id goes straight to the rank that looks it up.

TorchRec sends ids to the peer in the tower's group of hosts first, and from there on to the rank
that holds the table. Here one AlltoAll over all ranks does both, and leaves the samples in peer
order (SPTT's permutation), which is what the lookup inside the group expects.

Letters: W ranks, P groups of hosts, L ranks per group (W = P * L), B samples of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.packed_ids import PackedExchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """One lookup of a group of hosts: the tables of one tower that are cut in the same way."""

    by_rank: tuple[tuple[str, ...], ...]
    """Features that each of the L ranks looks up, in its order; row-wise all the same."""
    block_rows: tuple[int, ...] = ()
    """Row-wise: rows of a block, for every feature; empty where tables are cut by columns."""

    @property
    def is_row_wise(self) -> bool:
        """Whether an id's rank follows from the id."""
        return bool(self.block_rows)


def describe_lookups(embeddings: Sequence[Any]) -> list[Lookup]:
    """Describe what the ranks of a group look up, tower by tower.

    Args:
        embeddings: The group's `ShardedEmbeddingBagCollection`s.
    """
    found = []
    for embedding in embeddings:
        for kind, sharding in zip(
            embedding._sharding_types, embedding._embedding_shardings, strict=True
        ):
            by_rank = tuple(
                tuple(chain.from_iterable(config.feature_names() for config in configs))
                for configs in sharding._grouped_embedding_configs_per_rank
            )
            blocks: tuple[int, ...] = ()
            if kind == ShardingType.ROW_WISE.value:
                sizes = sharding._get_feature_hash_sizes()
                blocks = tuple(-(-size // len(by_rank)) for size in sizes)
            found.append(Lookup(by_rank=by_rank, block_rows=blocks))
    return found


class IndexRoute(nn.Module):
    """Sends ids to the ranks that look them up.

    Args:
        lookups: The lookups of this rank's group.
        cross_group: The peers, one of every group.
        group_rank: This rank's index in its group.
    """

    def __init__(
        self, lookups: Sequence[Lookup], cross_group: dist.ProcessGroup, group_rank: int
    ) -> None:
        super().__init__()
        groups: list[list[Lookup]] = [[] for _ in range(dist.get_world_size(cross_group))]
        dist.all_gather_object(groups, list(lookups), group=cross_group)
        self._own, self._rank = list(lookups), group_rank
        whole = [[k for k in group if not k.is_row_wise] for group in groups]
        cut = [[k for k in group if k.is_row_wise] for group in groups]
        self._size = len(lookups[0].by_rank)
        self._routes = [
            make(part, self._size)
            for make, part in ((_WholeRoute, whole), (_CutRoute, cut))
            if any(part)
        ]

    def start(self, features: KeyedJaggedTensor) -> list[Any]:
        """Start the exchange.

        Args:
            features: Ids of this rank's B samples.

        Returns:
            TorchRec's awaitables of awaitables of what this rank looks up.
        """
        return [route.start(features) for route in self._routes]

    def split(self, arrived: Sequence[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        """Give every lookup of this rank its ids.

        Args:
            arrived: What the exchanges brought, P * L * B samples in peer order.
        """
        by_route: dict[bool, list[KeyedJaggedTensor]] = {}
        for route, features in zip(self._routes, arrived, strict=True):
            sizes = [
                len(lookup.by_rank[self._rank])
                for lookup in self._own
                if lookup.is_row_wise == route.is_row_wise
            ]
            by_route[route.is_row_wise] = _widen(features).split(sizes)
        return [by_route[lookup.is_row_wise].pop(0) for lookup in self._own]


class _WholeRoute:
    """Tables that ranks hold with all their rows."""

    is_row_wise = False

    def __init__(self, groups: Sequence[Sequence[Lookup]], size: int) -> None:
        by_rank = [
            list(chain.from_iterable(lookup.by_rank[rank] for lookup in group))
            for group in groups
            for rank in range(size)
        ]
        self._order = _Order(list(chain.from_iterable(by_rank)))
        self._send = _make_exchange([len(names) for names in by_rank], len(groups))

    def start(self, features: KeyedJaggedTensor) -> Any:
        return self._send(_narrow(self._order(features)))


class _CutRoute:
    """Tables whose rows are dealt to the ranks of a group in blocks."""

    is_row_wise = True

    def __init__(self, groups: Sequence[Sequence[Lookup]], size: int) -> None:
        names = [[f for k in group for f in k.by_rank[0]] for group in groups]
        blocks = [rows for group in groups for k in group for rows in k.block_rows]
        self._order, self._size = _Order(list(chain.from_iterable(names))), size
        self._blocks = torch.tensor(blocks)
        # Bucketizing puts all features of bucket 0 first; the exchange wants groups first.
        total, starts = len(blocks), [0]
        for group in names:
            starts.append(starts[-1] + len(group))
        self._by_rank = [
            bucket * total + feature
            for g in range(len(groups))
            for bucket in range(size)
            for feature in range(starts[g], starts[g + 1])
        ]
        counts = [len(group) for group in names for _ in range(size)]
        self._send = _make_exchange(counts, len(groups))

    def start(self, features: KeyedJaggedTensor) -> Any:
        cut, _ = bucketize_kjt_before_all2all(
            self._order(features), num_buckets=self._size, block_sizes=self._blocks
        )
        return self._send(_narrow(cut.permute(self._by_rank)))


class _Order:
    """Picks features by name; a feature may occur several times."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._indices: list[int] | None = None
        self._tensor: torch.Tensor | None = None

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if self._indices is None:
            keys = {name: i for i, name in enumerate(features.keys())}
            self._indices = [keys[name] for name in self._names]
            self._tensor = torch.tensor(self._indices, dtype=torch.int32, device=features.device())
        return features.permute(self._indices, self._tensor)


def _make_exchange(counts: list[int], groups: int) -> Callable[[KeyedJaggedTensor], Any]:
    """Make the exchange: TorchRec's, but for gloo."""
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend(world) == "gloo":
        return PackedExchange(world, counts, len(counts) // groups)
    exchange: Callable[[KeyedJaggedTensor], Any] = KJTAllToAll(world, counts, groups)
    return exchange


def _narrow(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Ids as int32 on the network; a table has fewer than 2^31 rows."""
    return _with_values(features, features.values().to(torch.int32))


def _widen(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Ids as int64, which the lookup takes."""
    return _with_values(features, features.values().to(torch.int64))


def _with_values(features: KeyedJaggedTensor, values: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        stride=features.stride(),
    )
