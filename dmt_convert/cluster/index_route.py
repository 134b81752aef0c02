"""Ids on their way to the ranks that look them up.

TorchRec sends ids to the peer in the tower's group of hosts first, and from there on to the rank
that holds the table. Here one AlltoAll over all ranks does both, and leaves the samples in peer
order (SPTT's permutation), which is what the lookup inside the group expects.

Letters: W ranks, P groups of hosts, L ranks per group (W = P * L), B samples of one rank, F
features that a rank looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.types import Awaitable, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.arrays import Float32Array
from dmt_convert.cluster.exchange import all_to_all
from dmt_convert.data import Bag, Batch
from dmt_convert.model import to_tensor
from dmt_convert.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JaggedBatch:
    """B rows of input on a rank's device."""

    dense: Tensor
    """Dense inputs, shape (B, D), float32."""
    sparse: KeyedJaggedTensor
    """Ids of all features."""
    labels: Tensor | None
    """0 or 1 per row, shape (B,), float32."""


def carries_weights(spec: ModelSpec) -> bool:
    """Whether ids have weights whatever the data holds: a mean is a weighted sum.

    TorchRec has one pooling per table, and divides on the rank that has the samples. A weight of
    one over the bag's length works wherever the table's rows lie.
    """
    return any(feature.pooling == "mean" for feature in spec.features)


def to_jagged(
    batch: Batch, spec: ModelSpec, device: torch.device, *, weighted: bool
) -> JaggedBatch:
    """Put a batch on a device.

    Args:
        batch: Bags of the model's features, in its order.
        spec: The flat model.
        device: Where.
        weighted: Whether ids have weights; 1 if the data has none.
    """
    lengths = [np.diff(bag.offsets).astype(np.int32) for bag in batch.bags]
    weights = None
    if weighted:
        parts = [
            _id_weights(bag, count, mean=feature.pooling == "mean")
            for bag, count, feature in zip(batch.bags, lengths, spec.features, strict=True)
        ]
        weights = torch.from_numpy(np.concatenate(parts)).to(device)
    sparse = KeyedJaggedTensor(
        keys=list(batch.feature_names),
        values=torch.from_numpy(np.concatenate([bag.values for bag in batch.bags])).to(device),
        lengths=torch.from_numpy(np.concatenate(lengths)).to(device),
        weights=weights,
        stride=batch.num_rows,
    )
    labels = None if batch.labels is None else to_tensor(batch.labels).to(device)
    return JaggedBatch(dense=to_tensor(batch.dense).to(device), sparse=sparse, labels=labels)


def _id_weights(bag: Bag, lengths: npt.NDArray[np.int32], *, mean: bool) -> Float32Array:
    given = np.ones(len(bag.values), dtype=np.float32) if bag.weights is None else bag.weights
    if not mean:
        return given
    divided: Float32Array = (given / np.repeat(lengths, lengths)).astype(np.float32)
    return divided


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """One lookup of a group of hosts: the tables of one tower that are cut in the same way."""

    by_rank: tuple[tuple[str, ...], ...]
    """Features that each of the L ranks looks up, in its order; row-wise all the same."""
    block_rows: tuple[int, ...] = ()
    """Row-wise: rows of a block, for every feature; empty if tables are cut by columns."""

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
        self._tensor: Tensor | None = None

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if self._indices is None:
            keys = {name: i for i, name in enumerate(features.keys())}
            self._indices = [keys[name] for name in self._names]
            self._tensor = torch.tensor(self._indices, dtype=torch.int32, device=features.device())
        return features.permute(self._indices, self._tensor)


def _make_exchange(counts: list[int], groups: int) -> Callable[[KeyedJaggedTensor], Any]:
    """Make the exchange: ours over gloo, else TorchRec's."""
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


def _with_values(features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        stride=features.stride(),
    )


class PackedExchange:
    """Sends features to the ranks that look them up, with one message per pair.

    TorchRec's exchange of jagged tensors sends how many ids will come, then the lengths of the
    bags, then the ids. Here the lengths and the first ids, one per bag, travel together: with one
    id per bag nothing is left. What is left goes in a second message, whose size the receiver
    knows from the lengths. For gloo, where a message costs more than its bytes. All ranks have the
    same number of samples.

    Args:
        group: All ranks.
        counts: Features that go to each of the W ranks; the input has them in this order.
        stride: W over the number of groups of hosts: samples arrive rank 0 of all groups first.
    """

    def __init__(self, group: dist.ProcessGroup, counts: Sequence[int], stride: int) -> None:
        self.group, self.counts = group, list(counts)
        self.rank, self.size = dist.get_rank(group), len(self.counts)
        # rank i of every group, then rank i + 1: SPTT's peer order
        self.order = sorted(range(self.size), key=lambda rank: (rank % stride, rank))
        own = self.counts[self.rank]
        self.recat = torch.tensor(
            [place * own + feature for feature in range(own) for place in range(self.size)],
            dtype=torch.int32,
        )
        self.starts = [0, *accumulate(self.counts)]

    def __call__(self, features: KeyedJaggedTensor) -> Awaitable[Any]:
        """Start the exchange; ids are int32, weights float32."""
        return _Numbers(self, features)


class _Numbers(Awaitable[Any]):  # type: ignore[misc]
    """The first message: lengths, and as many ids as there are bags."""

    def __init__(self, exchange: PackedExchange, features: KeyedJaggedTensor) -> None:
        super().__init__()
        self._exchange, self._batch = exchange, features.stride()
        self._keys = features.keys()[
            exchange.starts[exchange.rank] : exchange.starts[exchange.rank + 1]
        ]
        weights = features.weights_or_none()
        self._streams = 1 if weights is None else 2
        values = [features.values()]
        if weights is not None:
            values.append(weights.view(torch.int32))
        self._pack(features.lengths().to(torch.int32), values)
        self._receive()

    def _pack(self, lengths: Tensor, values: list[Tensor]) -> None:
        """Cut what every rank gets into the first message and the rest."""
        batch, starts = self._batch, self._exchange.starts
        sums = lengths.view(-1, batch).sum(dim=1).tolist() if lengths.numel() else []
        self._heads: list[Tensor] = []
        self._rests: list[Tensor] = []
        at = 0
        for first, last in pairwise(starts):
            count = int(sum(sums[first:last]))
            room = (last - first) * batch
            head = lengths.new_empty(room * (1 + self._streams))
            head[:room] = lengths[first * batch : last * batch]
            fits = min(room, count)
            for stream, ids in enumerate(values, start=1):
                head[room * stream : room * stream + fits] = ids[at : at + fits]
            self._heads.append(head)
            self._rests.append(torch.cat([ids[at + fits : at + count] for ids in values]))
            at += count

    def _receive(self) -> None:
        own = self._exchange.counts[self._exchange.rank] * self._batch * (1 + self._streams)
        sizes = [own] * self._exchange.size
        self._received, self._works = all_to_all(self._exchange.group, self._heads, sizes)

    def _wait_impl(self) -> _Ids:
        for work in self._works:
            work.wait()
        room = self._exchange.counts[self._exchange.rank] * self._batch
        lengths = [head[:room] for head in self._received]
        counts = [int(each.sum()) for each in lengths]
        rest = [self._streams * max(0, count - room) for count in counts]
        return _Ids(
            exchange=self._exchange,
            keys=self._keys,
            heads=self._received,
            counts=counts,
            rests=all_to_all(self._exchange.group, self._rests, rest),
            batch=self._batch,
            streams=self._streams,
        )


class _Ids(Awaitable[KeyedJaggedTensor]):  # type: ignore[misc]
    """The second message, which is empty if every bag holds one id."""

    def __init__(
        self,
        *,
        exchange: PackedExchange,
        keys: list[str],
        heads: list[Tensor],
        counts: list[int],
        rests: tuple[list[Tensor], list[Any]],
        batch: int,
        streams: int,
    ) -> None:
        super().__init__()
        self._exchange, self._keys, self._heads, self._counts = exchange, keys, heads, counts
        (self._rests, self._works), self._batch, self._streams = rests, batch, streams

    def _wait_impl(self) -> KeyedJaggedTensor:
        for work in self._works:
            work.wait()
        order, own = self._exchange.order, len(self._keys)
        room = own * self._batch
        lengths = torch.cat([self._heads[rank][:room] for rank in order])
        streams = [
            torch.cat([part for rank in order for part in self._stream(rank, stream)])
            for stream in range(self._streams)
        ]
        weights = streams[1].view(torch.float32) if self._streams == 2 else None
        if own:
            lengths, values, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self._exchange.recat,
                lengths.view(own * len(order), self._batch),
                streams[0],
                weights,
                streams[0].numel(),
            )
        else:
            values = streams[0]
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            weights=weights,
            lengths=lengths.view(-1),
            stride=self._batch * len(order),
        )

    def _stream(self, rank: int, stream: int) -> tuple[Tensor, Tensor]:
        """Ids, or weights, of one rank: those of the first message, those of the second."""
        room = len(self._keys) * self._batch
        start = room * (1 + stream)
        rest = self._rests[rank]
        length = rest.numel() // self._streams
        return (
            self._heads[rank][start : start + min(room, self._counts[rank])],
            rest[length * stream : length * (stream + 1)],
        )
