"""Ids and their numbers in one message per pair of ranks, where TorchRec takes three.

TorchRec's exchange of jagged tensors sends how many ids will come, then the lengths of the bags,
then the ids. Here the lengths and the first ids, as many as there are bags, travel together: with
one id per bag nothing is left. What is left goes in a second message, whose size the receiver
knows from the lengths. For gloo, where a message costs more than its bytes. All ranks have the
same number of samples.

Letters: W ranks, F features that a rank looks up, B samples of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dmt_convert.cluster.duplex import swap


class PackedExchange:
    """Sends features to the ranks that look them up.

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
        self._received, self._works = swap(self._exchange.group, self._heads, sizes)

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
            rests=swap(self._exchange.group, self._rests, rest),
            batch=self._batch,
            streams=self._streams,
        )


class _Ids(Awaitable[KeyedJaggedTensor]):  # type: ignore[misc]
    """The second message, which is empty where every bag holds one id."""

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
