"""The exchange of tower outputs among peers, full duplex, with its gradients on the way back.

Peers are the ranks of the same index in all groups of hosts. A rank holds its towers' outputs for
the samples of all its peers, and needs all towers' outputs for its own samples.

Letters: P peers, B samples of one rank, O elements that a group's towers emit per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import LazyAwaitable

from dmt_convert.cluster.wire import Wire

_TAG: Final = 0


def all_to_all(
    group: dist.ProcessGroup, sent: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Any]]:
    """Send every rank its part, and receive one from each, full duplex; for gloo.

    Every receive is posted before any send. The stock AlltoAll of gloo queues payload before it
    tells that it can receive, so that a rank that comes late gets its payload in one direction at
    a time. Empty parts are not sent.

    Args:
        group: The ranks.
        sent: One contiguous, flat tensor per rank, all of one type.
        sizes: Elements that come from every rank.

    Returns:
        What is received, one tensor per rank, valid after all works were waited for (a rank's own
        part is the one it sent); and the works.
    """
    rank, size = group.rank(), group.size()
    received = [
        sent[rank] if peer == rank else sent[0].new_empty(n) for peer, n in enumerate(sizes)
    ]
    others = [(rank + step) % size for step in range(1, size)]
    # the group's own methods: torch.distributed's wrappers would double the cost of a message
    works = [group.recv([received[peer]], peer, _TAG) for peer in reversed(others) if sizes[peer]]
    works += [group.send([sent[peer]], peer, _TAG) for peer in others if sent[peer].numel()]
    return received, works


@dataclass(slots=True, kw_only=True, eq=False)
class _Transfer:
    """Bytes on their way among peers."""

    works: list[Any] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)

    def wait(self) -> list[Tensor]:
        """Wait for all; returns one uint8 tensor per peer."""
        for work in self.works:
            work.wait()
        received, self.works, self.received, self.sent = self.received, [], [], []
        return received


class PeerExchange:
    """Sends every peer the tower outputs of its samples, and gathers all towers' of one's own.

    Args:
        group: The peers.
        wires: How every peer's tower outputs travel, and their gradients back, in the order of the
            group.
        order: The column of what this rank emits for every column that it sends; empty: as they
            are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wires: Sequence[tuple[Wire, Wire]],
        order: Sequence[int] = (),
    ) -> None:
        self.group = group
        self.forward_wires = [forward for forward, _ in wires]
        self.backward_wires = [backward for _, backward in wires]
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.order = torch.tensor(order, dtype=torch.int64)
        self._duplex = dist.get_backend(group) == "gloo"

    def __call__(self, emitted: Tensor) -> LazyAwaitable[Tensor]:
        """Start the exchange.

        Args:
            emitted: Outputs of this rank's towers for the samples of all peers, in the order of
                the group: shape (P * B, own O).

        Returns:
            An awaitable of all towers' outputs for this rank's samples, shape (B, sum of O).
        """
        transfer = _Transfer()
        token = _Start.apply(emitted, self, transfer)  # type: ignore[no-untyped-call]
        return _Emitted(self, transfer, token, emitted.shape[0] // self.size)

    def scatter(self, emitted: Tensor, transfer: _Transfer) -> None:
        """Send every peer its samples; receive one's own samples from every peer."""
        batch = emitted.shape[0] // self.size
        parts = self.forward_wires[self.rank].encode(self._arrange(emitted), self.size)
        self._post(parts, [wire.message_bytes(batch) for wire in self.forward_wires], transfer)

    def join_outputs(self, transfer: _Transfer, batch: int) -> Tensor:
        """Wait for all towers' outputs for one's own samples: shape (B, sum of O)."""
        pairs = zip(self.forward_wires, transfer.wait(), strict=True)
        return torch.cat([wire.decode(data, batch) for wire, data in pairs], dim=1)

    def gather(self, gradient: Tensor, transfer: _Transfer) -> None:
        """Send every peer the gradient of its towers' outputs, the way back of `scatter`."""
        columns = torch.split(gradient, [wire.width for wire in self.backward_wires], dim=1)
        pairs = zip(self.backward_wires, columns, strict=True)
        parts = [wire.encode(part)[0] for wire, part in pairs]
        size = self.backward_wires[self.rank].message_bytes(len(gradient))
        self._post(parts, [size] * self.size, transfer)

    def join_gradients(self, transfer: _Transfer, batch: int) -> Tensor:
        """Wait for the gradient of what this rank emitted: shape (P * B, own O)."""
        wire = self.backward_wires[self.rank]
        gradient = torch.cat([wire.decode(data, batch) for data in transfer.wait()])
        # The loss is a mean over all ranks: TorchRec divides in its own exchanges, too.
        gradient = gradient.div_(self.size)
        return self._arrange(gradient, back=True)

    def _arrange(self, columns: Tensor, *, back: bool = False) -> Tensor:
        if not len(self.order):
            return columns
        order = torch.argsort(self.order) if back else self.order
        return columns.index_select(1, order.to(columns.device))

    def _post(self, parts: list[Tensor], sizes: list[int], transfer: _Transfer) -> None:
        transfer.sent = parts
        if self._duplex:
            transfer.received, transfer.works = all_to_all(self.group, parts, sizes)
            return
        joined, received = torch.cat(parts), parts[0].new_empty(sum(sizes))
        transfer.sent = [joined]
        transfer.received = list(torch.split(received, sizes))
        transfer.works = [
            dist.all_to_all_single(
                received,
                joined,
                sizes,
                [part.numel() for part in parts],
                group=self.group,
                async_op=True,
            )
        ]


class _Emitted(LazyAwaitable[Tensor]):  # type: ignore[misc]
    """All towers' outputs for this rank's samples, once they have come."""

    def __init__(
        self, exchange: PeerExchange, transfer: _Transfer, token: Tensor, batch: int
    ) -> None:
        super().__init__()
        self._arguments = (token, exchange, transfer, batch)

    def _wait_impl(self) -> Tensor:
        joined: Tensor = _Finish.apply(*self._arguments)  # type: ignore[no-untyped-call]
        return joined


class _Start(torch.autograd.Function):
    """Starts the exchange; backward, ends that of the gradients."""

    @staticmethod
    def forward(ctx: Any, emitted: Tensor, exchange: PeerExchange, transfer: _Transfer) -> Tensor:
        exchange.scatter(emitted, transfer)
        ctx.exchange, ctx.transfer, ctx.samples = exchange, transfer, len(emitted)
        return emitted.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        samples = ctx.samples // ctx.exchange.size
        gradient = ctx.exchange.join_gradients(ctx.transfer, samples)
        return gradient, None, None


class _Finish(torch.autograd.Function):
    """Ends the exchange; backward, starts that of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, exchange: PeerExchange, transfer: _Transfer, batch: int
    ) -> Tensor:
        ctx.exchange, ctx.transfer = exchange, transfer
        return exchange.join_outputs(transfer, batch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.exchange.gather(gradient, ctx.transfer)
        return gradient.new_zeros(1), None, None, None
