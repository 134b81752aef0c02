"""The exchange of tower outputs among peers, full duplex, with its gradients on the way back.

Peers are the ranks of the same index in all groups of hosts. A rank holds its towers' outputs for
the samples of all its peers, and needs all towers' outputs for its own samples.

Letters: P peers, B samples of one rank, O elements that a group's towers emit per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import LazyAwaitable

from dmt_convert.cluster.duplex import swap
from dmt_convert.cluster.wire import Wire
from dmt_convert.spec import CommDtype


@dataclass(slots=True, kw_only=True, eq=False)
class _Transfer:
    """Bytes under way among peers."""

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
        widths: O of every peer's towers, in the order of the group.
        dtype: Precision on the network, forward and backward.
        vector_dim: Elements that share a scale where the precision has any.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        widths: Sequence[int],
        dtype: CommDtype,
        vector_dim: int,
    ) -> None:
        self.group, self.widths = group, list(widths)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.forward_wire = Wire(dtype=dtype, vector_dim=vector_dim)
        self.backward_wire = Wire(dtype=dtype, vector_dim=vector_dim, backward=True)
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
        wire = self.forward_wire
        parts = [wire.encode(part) for part in torch.split(emitted, batch)]
        self._post(parts, [wire.nbytes(batch * width) for width in self.widths], transfer)

    def gather(self, gradient: Tensor, transfer: _Transfer) -> None:
        """Send every peer the gradient of its towers' outputs, the way back of `scatter`."""
        wire = self.backward_wire
        parts = [wire.encode(part) for part in torch.split(gradient, self.widths, dim=1)]
        size = wire.nbytes(gradient.shape[0] * self.widths[self.rank])
        self._post(parts, [size] * self.size, transfer)

    def _post(self, parts: list[Tensor], sizes: list[int], transfer: _Transfer) -> None:
        transfer.sent = parts
        if self._duplex:
            transfer.received, transfer.works = swap(self.group, parts, sizes)
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
        ctx.exchange, ctx.transfer, ctx.shape = exchange, transfer, emitted.shape
        return emitted.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        wire = ctx.exchange.backward_wire
        parts = [wire.decode(part) for part in ctx.transfer.wait()]
        # The loss is a mean over all ranks; TorchRec divides in its exchanges, too.
        gradient = torch.cat(parts).view(ctx.shape).div_(ctx.exchange.size)
        return gradient, None, None


class _Finish(torch.autograd.Function):
    """Ends the exchange; backward, starts that of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, exchange: PeerExchange, transfer: _Transfer, batch: int
    ) -> Tensor:
        ctx.exchange, ctx.transfer = exchange, transfer
        received = transfer.wait()
        wire = exchange.forward_wire
        return torch.cat(
            [wire.decode(part).view(batch, -1) for part in received if part.numel()], 1
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.exchange.gather(gradient, ctx.transfer)
        return gradient.new_zeros(1), None, None, None
