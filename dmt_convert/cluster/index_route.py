"""Ids on their way to the ranks that look them up.

TorchRec sends ids to the peer in the tower's group of hosts first, and from there on to the rank
that holds the table. Here one AlltoAll over all ranks does both, and leaves the samples in peer
order (SPTT's permutation), which is what the lookup inside the group expects.

Ids are put in order in host memory, where they are read: numbers that say how a message is cut
need not be fetched from a GPU. What a rank has to learn from others, how many ids come, is the one
thing that the host waits for in a step.

Letters: W ranks, P groups of hosts, L ranks per group (W = P * L), B samples of one rank, F
features that a rank looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.arrays import Float32Array
from dmt_convert.cluster.transport import Transfer, Transport
from dmt_convert.data import Bag, Batch
from dmt_convert.model import to_tensor
from dmt_convert.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JaggedBatch:
    """B rows of input, on a rank's device but for the ids."""

    dense: Tensor
    """Dense inputs, shape (B, D), float32."""
    sparse: KeyedJaggedTensor
    """Ids of all features, in host memory."""
    labels: Tensor | None
    """0 or 1 per row, shape (B,), float32."""


def carries_weights(spec: ModelSpec) -> bool:
    """Whether ids have weights whatever the data holds: a mean is a weighted sum.

    TorchRec has one pooling per table, and divides on the rank that has the samples. A weight of
    one over the bag's length works wherever the table's rows lie.
    """
    return any(feature.pooling == "mean" for feature in spec.features)


def to_jagged(
    batch: Batch, spec: ModelSpec, transport: Transport, *, weighted: bool
) -> JaggedBatch:
    """Put a batch where the engine takes it from.

    Args:
        batch: Bags of the model's features, in its order.
        spec: The flat model.
        transport: Of this rank.
        weighted: Whether ids have weights; 1 if the data has none.
    """
    lengths = [np.diff(bag.offsets).astype(np.int32) for bag in batch.bags]
    weights = None
    if weighted:
        parts = [
            _id_weights(bag, count, mean=feature.pooling == "mean")
            for bag, count, feature in zip(batch.bags, lengths, spec.features, strict=True)
        ]
        weights = torch.from_numpy(np.concatenate(parts))
    sparse = KeyedJaggedTensor(
        keys=list(batch.feature_names),
        values=torch.from_numpy(np.concatenate([bag.values for bag in batch.bags])),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        weights=weights,
        stride=batch.num_rows,
    )
    labels = None if batch.labels is None else transport.put(to_tensor(batch.labels))
    return JaggedBatch(dense=transport.put(to_tensor(batch.dense)), sparse=sparse, labels=labels)


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


class IndexRoute:
    """Sends ids to the ranks that look them up.

    Args:
        lookups: The lookups of this rank's group.
        cross_group: The peers, one of every group.
        group_rank: This rank's index in its group.
        transport: How ranks exchange.
    """

    def __init__(
        self,
        lookups: Sequence[Lookup],
        cross_group: dist.ProcessGroup,
        group_rank: int,
        transport: Transport,
    ) -> None:
        groups: list[list[Lookup]] = [[] for _ in range(dist.get_world_size(cross_group))]
        dist.all_gather_object(groups, list(lookups), group=cross_group)
        self._own, self._rank, self._transport = list(lookups), group_rank, transport
        whole = [[k for k in group if not k.is_row_wise] for group in groups]
        cut = [[k for k in group if k.is_row_wise] for group in groups]
        self._size = len(lookups[0].by_rank)
        within = transport.input_group()
        self._routes = [
            make(part, self._size, within, transport)
            for make, part in ((_WholeRoute, whole), (_CutRoute, cut))
            if any(part)
        ]

    def start(self, features: KeyedJaggedTensor) -> Arriving:
        """Start the exchange.

        Args:
            features: Ids of this rank's B samples, in host memory.
        """
        assert features.device().type == "cpu", "messages are cut in host memory"
        with self._transport.ahead(), torch.no_grad():
            return Arriving([route.start(features) for route in self._routes], self._transport)

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
            by_route[route.is_row_wise] = features.split(sizes)
        return [by_route[lookup.is_row_wise].pop(0) for lookup in self._own]


class Arriving:
    """Ids of a batch on their way, in two messages."""

    def __init__(self, streams: Sequence[_Stream], transport: Transport) -> None:
        self._streams, self._transport = streams, transport

    def advance(self) -> None:
        """Send what the first message could not hold; all ranks in the same order."""
        with self._transport.ahead(), torch.no_grad():
            for stream in self._streams:
                stream.advance()

    def wait(self) -> list[KeyedJaggedTensor]:
        """Return what this rank looks up, per route: ids are int64."""
        self.advance()
        with self._transport.ahead(), torch.no_grad():
            arrived = [stream.wait() for stream in self._streams]
        for found in arrived:
            self._transport.take(found.values(), found.lengths(), found.weights_or_none())
        return arrived


class _WholeRoute:
    """Tables that ranks hold with all their rows."""

    is_row_wise = False

    def __init__(
        self,
        groups: Sequence[Sequence[Lookup]],
        size: int,
        within: dist.ProcessGroup,
        transport: Transport,
    ) -> None:
        by_rank = [
            list(chain.from_iterable(lookup.by_rank[rank] for lookup in group))
            for group in groups
            for rank in range(size)
        ]
        self._order = FeatureOrder(list(chain.from_iterable(by_rank)))
        self._send = _Exchange(within, transport, [len(names) for names in by_rank], size)

    def start(self, features: KeyedJaggedTensor) -> _Stream:
        return self._send(self._order(features))


class _CutRoute:
    """Tables whose rows are dealt to the ranks of a group in blocks."""

    is_row_wise = True

    def __init__(
        self,
        groups: Sequence[Sequence[Lookup]],
        size: int,
        within: dist.ProcessGroup,
        transport: Transport,
    ) -> None:
        names = [[f for k in group for f in k.by_rank[0]] for group in groups]
        blocks = [rows for group in groups for k in group for rows in k.block_rows]
        self._order, self._size = FeatureOrder(list(chain.from_iterable(names))), size
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
        self._send = _Exchange(within, transport, counts, size)

    def start(self, features: KeyedJaggedTensor) -> _Stream:
        cut, _ = bucketize_kjt_before_all2all(
            self._order(features), num_buckets=self._size, block_sizes=self._blocks
        )
        return self._send(cut.permute(self._by_rank))


class FeatureOrder:
    """Picks features by name; a feature may occur several times."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._indices: list[int] | None = None
        self._tensor: Tensor | None = None

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return these features, in the order of their names."""
        if self._indices is None:
            keys = {name: i for i, name in enumerate(features.keys())}
            self._indices = [keys[name] for name in self._names]
            self._tensor = torch.tensor(self._indices, dtype=torch.int32)
        return features.permute(self._indices, self._tensor)


class _Exchange:
    """Sends features to the ranks that look them up, with one message per pair, or two.

    The lengths of the bags and the first ids, one per bag, travel together: their number is known
    to all, for all ranks have the same number of samples. With one id per bag nothing is left.
    What is left goes in a second message, whose size the receiver knows from the lengths. (TorchRec
    sends how many ids will come, then the lengths, then the ids.) Ids are int32 on the network: a
    table has fewer than 2^31 rows.

    Args:
        group: All ranks.
        transport: How they exchange.
        counts: Features that go to each of the W ranks; the input has them in this order.
        stride: L, ranks of a group of hosts: samples arrive rank 0 of all groups first.
    """

    def __init__(
        self, group: dist.ProcessGroup, transport: Transport, counts: Sequence[int], stride: int
    ) -> None:
        self.group, self.transport, self.counts = group, transport, list(counts)
        self.rank, self.size = dist.get_rank(group), len(self.counts)
        # rank i of every group, then rank i + 1: SPTT's peer order
        self.order = sorted(range(self.size), key=lambda rank: (rank % stride, rank))
        own = self.counts[self.rank]
        self.recat = transport.put(
            torch.tensor(
                [place * own + feature for feature in range(own) for place in range(self.size)],
                dtype=torch.int32,
            )
        )
        self.starts = [0, *accumulate(self.counts)]

    def __call__(self, features: KeyedJaggedTensor) -> _Stream:
        """Start the exchange of ids, and weights, that lie in host memory."""
        return _Stream(self, features)

    def send(self, host: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Transfer:
        """Send parts that lie one after the other in host memory."""
        sent = self.transport.put(host)
        return self.transport.all_to_all(self.group, sent, sizes, counts)


class _Stream:
    """What one rank sends, and what comes to it."""

    def __init__(self, exchange: _Exchange, features: KeyedJaggedTensor) -> None:
        self._exchange, self._batch = exchange, features.stride()
        first, last = exchange.starts[exchange.rank], exchange.starts[exchange.rank + 1]
        self._keys = features.keys()[first:last]
        weights = features.weights_or_none()
        self._num = 1 if weights is None else 2
        values = [features.values().to(torch.int32)]
        if weights is not None:
            values.append(weights.view(torch.int32))
        heads = self._pack(features.lengths().to(torch.int32), values)
        own = len(self._keys) * self._batch * (1 + self._num)
        self._heads = exchange.send(*heads, [own] * exchange.size)
        self._second: Transfer | None = None

    def _pack(self, lengths: Tensor, values: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Cut what every rank gets into the first message and the rest."""
        batch, starts, num = self._batch, self._exchange.starts, self._num
        sums = lengths.view(-1, batch).sum(dim=1).tolist() if lengths.numel() else []
        rooms = [(last - first) * batch for first, last in pairwise(starts)]
        counts = [int(sum(sums[first:last])) for first, last in pairwise(starts)]
        lefts = [max(0, count - room) for count, room in zip(counts, rooms, strict=True)]
        sizes = [room * (1 + num) for room in rooms]
        self._rests = lengths.new_empty(sum(lefts) * num), [left * num for left in lefts]
        heads = lengths.new_empty(sum(sizes))
        ranks = zip(torch.split(heads, sizes), torch.split(*self._rests), strict=True)
        at = bag = 0
        for (head, rest), count, room, left in zip(ranks, counts, rooms, lefts, strict=True):
            head[:room] = lengths[bag : bag + room]
            fits = count - left
            for stream, ids in enumerate(values):
                first = room * (1 + stream)
                head[first : first + fits] = ids[at : at + fits]
                if left:
                    rest[left * stream : left * (stream + 1)] = ids[at + fits : at + count]
            at, bag = at + count, bag + room
        return heads, sizes

    def advance(self) -> None:
        """Send the rest, once it is known how much of it comes."""
        if self._second is not None:
            return
        size, own, batch = self._exchange.size, len(self._keys), self._batch
        heads = self._heads.wait().view(size, own * batch * (1 + self._num))
        # the one number of a step that the host waits for
        lengths = heads[:, : own * batch].reshape(size, own, batch).sum(dim=2).tolist()
        self._counts = [sum(of_rank) for of_rank in lengths]
        self._per_key = [sum(of_key) for of_key in zip(*lengths, strict=True)]
        sizes = [self._num * max(0, count - own * batch) for count in self._counts]
        self._second = self._exchange.send(*self._rests, sizes)

    def wait(self) -> KeyedJaggedTensor:
        """Return what came, in peer order."""
        assert self._second is not None
        order, own = self._exchange.order, len(self._keys)
        room = own * self._batch
        heads = self._heads.wait().view(self._exchange.size, room * (1 + self._num))
        rests = self._second.parts()
        lengths = torch.cat([heads[rank, :room] for rank in order])
        streams = [
            torch.cat([part for rank in order for part in self._part(heads, rests, rank, stream)])
            for stream in range(self._num)
        ]
        values = streams[0].to(torch.int64)
        weights = streams[1].view(torch.float32) if self._num == 2 else None
        if own:
            lengths, values, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self._exchange.recat,
                lengths.view(own * len(order), self._batch),
                values,
                weights,
                values.numel(),
            )
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            weights=weights,
            lengths=lengths.view(-1),
            stride=self._batch * len(order),
            length_per_key=self._per_key,
        )

    def _part(
        self, heads: Tensor, rests: list[Tensor], rank: int, stream: int
    ) -> tuple[Tensor, Tensor]:
        """Ids, or weights, of one rank: those of the first message, those of the second."""
        room = len(self._keys) * self._batch
        start = room * (1 + stream)
        length = rests[rank].numel() // self._num
        return (
            heads[rank, start : start + min(room, self._counts[rank])],
            rests[rank][length * stream : length * (stream + 1)],
        )
