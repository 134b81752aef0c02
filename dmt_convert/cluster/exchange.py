"""The exchange of tower outputs among peers, full duplex, with its gradients on the way back.

Peers are the ranks of the same index in all groups of hosts. A rank holds its towers' outputs for
the samples of all its peers, and needs all towers' outputs for its own samples.

Letters: P peers, B samples of one rank, O elements that a group's towers emit per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import LazyAwaitable

from dmt_convert.cluster.transport import Transfer, Transport
from dmt_convert.cluster.wire import Wire


class PeerExchange:
    """Sends every peer the tower outputs of its samples, and gathers all towers' of one's own.

    Args:
        group: The peers.
        transport: How they exchange.
        wires: How every peer's tower outputs travel, and their gradients back, in the order of the
            group.
        order: The column of what this rank emits for every column that it sends; empty: as they
            are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        transport: Transport,
        wires: Sequence[tuple[Wire, Wire]],
        order: Sequence[int] = (),
    ) -> None:
        self.group, self._transport = group, transport
        self.forward_wires = [forward for forward, _ in wires]
        self.backward_wires = [backward for _, backward in wires]
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        columns = torch.tensor(order, dtype=torch.int64)
        self._order = transport.put(columns)
        self._way_back = transport.put(torch.argsort(columns))
        self._is_even = len({wire.layout for wire in self.backward_wires}) == 1

    def __call__(self, emitted: Tensor) -> LazyAwaitable[Tensor]:
        """Start the exchange.

        Args:
            emitted: Outputs of this rank's towers for the samples of all peers, in the order of
                the group: shape (P * B, own O).

        Returns:
            An awaitable of all towers' outputs for this rank's samples, shape (B, sum of O).
        """
        box = _Box()
        token = _Start.apply(emitted, self, box)  # type: ignore[no-untyped-call]
        return _Emitted(self, box, token, emitted.shape[0] // self.size)

    def scatter(self, emitted: Tensor) -> Transfer:
        """Send every peer its samples; receive one's own samples from every peer."""
        batch = emitted.shape[0] // self.size
        if len(self._order):
            emitted = emitted.index_select(1, self._order)
        messages = self.forward_wires[self.rank].encode(emitted, self.size)
        sizes = [wire.message_bytes(batch) for wire in self.forward_wires]
        return self._post(messages, sizes)

    def join_outputs(self, transfer: Transfer, batch: int) -> Tensor:
        """Wait for all towers' outputs for one's own samples: shape (B, sum of O)."""
        pairs = zip(self.forward_wires, transfer.parts(), strict=True)
        return torch.cat([wire.decode(data, batch) for wire, data in pairs], dim=1)

    def gather(self, gradient: Tensor) -> Transfer:
        """Send every peer the gradient of its towers' outputs, the way back of `scatter`."""
        own = self.backward_wires[self.rank]
        sizes = [own.message_bytes(len(gradient))] * self.size
        if self._is_even:  # all messages in one pass, one after the other
            stacked = gradient.reshape(len(gradient), self.size, own.width).transpose(0, 1)
            return self._post(own.encode(stacked.reshape(-1, own.width), self.size), sizes)
        columns = torch.split(gradient, [wire.width for wire in self.backward_wires], dim=1)
        pairs = zip(self.backward_wires, columns, strict=True)
        parts = [wire.encode(part)[0] for wire, part in pairs]
        return self._transport.all_to_all(self.group, parts, sizes)

    def _post(self, messages: Tensor, sizes: Sequence[int]) -> Transfer:
        """Send messages of one size, one per peer, that lie one after the other."""
        counts = [messages.shape[1]] * self.size
        return self._transport.all_to_all(self.group, messages.view(-1), sizes, counts)

    def join_gradients(self, transfer: Transfer, batch: int) -> Tensor:
        """Wait for the gradient of what this rank emitted: shape (P * B, own O)."""
        wire = self.backward_wires[self.rank]
        assert not wire.mark_bytes, "messages without marks are read as one"
        gradient = wire.decode(transfer.wait(), batch * self.size)
        # The loss is a mean over all ranks: TorchRec divides in its own exchanges, too.
        gradient = gradient.div_(self.size)
        return gradient.index_select(1, self._way_back) if len(self._order) else gradient


@dataclass(slots=True, eq=False)
class _Box:
    """What is under way: outputs, or their gradients."""

    transfer: Transfer | None = None

    def take(self) -> Transfer:
        """Return it, once."""
        transfer, self.transfer = self.transfer, None
        assert transfer is not None
        return transfer


class _Emitted(LazyAwaitable[Tensor]):  # type: ignore[misc]
    """All towers' outputs for this rank's samples, once they have come."""

    def __init__(self, exchange: PeerExchange, box: _Box, token: Tensor, batch: int) -> None:
        super().__init__()
        self._arguments = (token, exchange, box, batch)

    def _wait_impl(self) -> Tensor:
        joined: Tensor = _Finish.apply(*self._arguments)  # type: ignore[no-untyped-call]
        return joined


class _Start(torch.autograd.Function):
    """Starts the exchange; backward, ends that of the gradients."""

    @staticmethod
    def forward(ctx: Any, emitted: Tensor, exchange: PeerExchange, box: _Box) -> Tensor:
        box.transfer = exchange.scatter(emitted)
        ctx.exchange, ctx.box, ctx.samples = exchange, box, len(emitted)
        return emitted.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        samples = ctx.samples // ctx.exchange.size
        return ctx.exchange.join_gradients(ctx.box.take(), samples), None, None


class _Finish(torch.autograd.Function):
    """Ends the exchange; backward, starts that of the gradients."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, exchange: PeerExchange, box: _Box, batch: int) -> Tensor:
        ctx.exchange, ctx.box = exchange, box
        return exchange.join_outputs(box.take(), batch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.box.transfer = ctx.exchange.gather(gradient)
        return gradient.new_zeros(1), None, None, None
