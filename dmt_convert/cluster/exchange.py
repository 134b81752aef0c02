"""The exchange of tower outputs among peers, full duplex, with its gradients on the way back.

Peers are the ranks of the same index in all groups of hosts. A rank holds its towers' outputs for
the samples of all its peers, and needs all towers' outputs for its own samples.

Letters: P peers, B samples of one rank, n samples in all, O elements that a group's towers emit
per sample, V vectors of D elements each (V * D = n * O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import LazyAwaitable

from dmt_convert.spec import CommDtype

_TAG: Final = 0
_HEADER_BYTES: Final = 4
"""Of the power of two in front of gradients."""
_SCALE_BYTES: Final = {"int8": 8, "fp8": 4}
"""Per vector: int8 keeps a scale and a bias, fp8 a scale, float32 each."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Turns float32 into the bytes that cross hosts, and back.

    int8 and fp8 scale every vector by its largest element; fp8 keeps more of the mantissa
    forward (e4m3) and more of the exponent backward (e5m2), as TorchRec's codec does. Gradients
    of a mean over a large batch are tiny: as fp16 and int8 they are first multiplied by a power of
    two, which travels in front of them.
    """

    dtype: CommDtype
    """Precision on the network."""
    vector_dim: int
    """D: elements that share a scale; divides every O."""
    backward: bool = False
    """Whether gradients travel."""

    def nbytes(self, elements: int) -> int:
        """Bytes of a number of elements."""
        if not elements:
            return 0
        if self.dtype == "fp32":
            return 4 * elements
        header = _HEADER_BYTES if self._lifts else 0
        if self.dtype in ("fp16", "bf16"):
            return header + 2 * elements
        return header + elements + elements // self.vector_dim * _SCALE_BYTES[self.dtype]

    @property
    def _lifts(self) -> bool:
        """Whether numbers are multiplied before they are packed."""
        return self.backward and self.dtype in ("fp16", "int8")

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes of a float32 tensor: uint8, shape (nbytes,)."""
        if not self._lifts or not x.numel():
            return self._pack(x.contiguous())
        largest = x.abs().max()
        lift = torch.exp2(-torch.floor(torch.log2(largest)).clamp(-100, 100))
        lift = torch.where((largest > 0) & torch.isfinite(largest), lift, 1.0)
        header = lift.reshape(1).view(torch.uint8)
        return torch.cat([header, self._pack((x * lift).contiguous())])

    def decode(self, data: Tensor) -> Tensor:
        """Return what `encode` was given, flattened, as float32."""
        if not self._lifts or not data.numel():
            return self._unpack(data)
        header, rest = data.tensor_split([_HEADER_BYTES])
        return self._unpack(rest) / header.clone().view(torch.float32)

    def _pack(self, x: Tensor) -> Tensor:
        if self.dtype == "fp32":
            return x.view(-1).view(torch.uint8)
        if self.dtype == "bf16":
            return x.to(torch.bfloat16).view(-1).view(torch.uint8)
        if self.dtype == "fp16":
            largest = torch.finfo(torch.float16).max
            return x.clamp(-largest, largest).to(torch.float16).view(-1).view(torch.uint8)
        vectors = x.view(-1, self.vector_dim)
        if self.dtype == "int8":
            quantized: Tensor = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(vectors)
            # fbgemm ignores NaN; a scale of NaN shows that training diverged
            quantized[~torch.isfinite(vectors).all(dim=1), -_SCALE_BYTES["int8"] :] = 255
            return quantized.view(-1)
        kind = self._fp8()
        scale = vectors.abs().amax(dim=1, keepdim=True) / torch.finfo(kind).max
        scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
        small = (vectors / scale).to(kind).view(torch.uint8)
        return torch.cat([small.view(-1), scale.view(-1).view(torch.uint8)])

    def _unpack(self, data: Tensor) -> Tensor:
        if self.dtype == "fp32":
            return data.view(torch.float32)
        if self.dtype == "bf16":
            return data.view(torch.bfloat16).float()
        if self.dtype == "fp16":
            return data.view(torch.float16).float()
        vectors = data.numel() // (self.vector_dim + _SCALE_BYTES[self.dtype])
        if self.dtype == "int8":
            rows: Tensor = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(data.view(vectors, -1))
            return rows.view(-1)
        small, scale = data.tensor_split([vectors * self.vector_dim])
        found = small.view(self._fp8()).view(vectors, -1).float()
        scaled: Tensor = found * scale.clone().view(torch.float32).unsqueeze(1)
        return scaled.view(-1)

    def _fp8(self) -> torch.dtype:
        return torch.float8_e5m2 if self.backward else torch.float8_e4m3fn


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
        widths: O of every peer's towers, in the order of the group.
        dtype: Precision on the network, forward and backward.
        vector_dim: Elements that share a scale, if the precision has scales.
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
        ctx.exchange, ctx.transfer, ctx.shape = exchange, transfer, emitted.shape
        return emitted.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        wire = ctx.exchange.backward_wire
        parts = [wire.decode(part) for part in ctx.transfer.wait()]
        # The loss is a mean over all ranks: TorchRec divides in its own exchanges, too.
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
