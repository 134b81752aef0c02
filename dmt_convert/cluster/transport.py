"""Where a rank computes, and how it exchanges with others: two things, though NCCL means GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

_TAG: Final = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """An exchange that is under way."""

    received: Tensor
    """What every rank sends to this one, one after the other; valid once waited for."""
    sizes: list[int]
    """Elements that come from every rank."""
    works: list[Any] = field(default_factory=list)
    sent: Any = None
    """Kept until it has left."""

    def wait(self) -> Tensor:
        """Wait for all: on a GPU, what is queued next waits, not this process."""
        for work in self.works:
            work.wait()
        self.works, self.sent = [], None
        return self.received

    def parts(self) -> list[Tensor]:
        """Wait for all; one tensor per rank."""
        return list(torch.split(self.wait(), self.sizes))


class Transport:
    """A rank's device, and its way to exchange tensors.

    Attributes:
        device: Where the model and what is exchanged lie.
        is_collective: Whether an exchange is one collective.
        is_asynchronous: Whether the device computes while this process goes on: reading a number
            from it would wait.

    Args:
        device: Where the model and what is exchanged lie.
        backend: How ranks talk. gloo: a message per pair, both directions at once. nccl: one
            collective per exchange, which any backend can do.
    """

    def __init__(self, device: torch.device | str, backend: str) -> None:
        self.device = torch.device(device)
        self.is_collective = backend != "gloo"
        self.is_asynchronous = self.device != torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def put(self, host: Tensor) -> Tensor:
        """Copy what lies in host memory to the device; this process does not wait for it."""
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Queue work of a later batch beside the computation; on a CPU it is done at once."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def take(self, *tensors: Tensor | None) -> None:
        """Let what is queued next wait for tensors that were made `ahead`."""
        if self._stream is None:
            return
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._stream)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(now)

    def input_group(self) -> dist.ProcessGroup:
        """Return the group of all ranks that ids travel in; all ranks at once.

        Collectives of one group run one after the other: in a group of their own, ids need not
        wait until gradients are averaged.
        """
        if self.is_collective:
            made: dist.ProcessGroup = dist.new_group()
            return made
        world = dist.group.WORLD
        assert world is not None
        return world

    def all_to_all(
        self,
        group: dist.ProcessGroup,
        sent: Tensor | Sequence[Tensor],
        sizes: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Transfer:
        """Send every rank its part, and receive one from each.

        Args:
            group: The ranks.
            sent: One flat tensor per rank, all of one type; or one with all of them, one after the
                other, which a collective would make of them.
            sizes: Elements that come from every rank.
            counts: Elements that go to every rank, if they are in one tensor.
        """
        like = sent if isinstance(sent, Tensor) else sent[0]
        transfer = Transfer(received=like.new_empty(sum(sizes)), sizes=list(sizes))
        if self.is_collective:
            if counts is None:
                counts, sent = [part.numel() for part in sent], torch.cat(list(sent))
            assert isinstance(sent, Tensor)
            work = dist.all_to_all_single(
                transfer.received, sent, list(sizes), list(counts), group=group, async_op=True
            )
            transfer.sent, transfer.works = sent, [work]
        else:
            parts = list(sent if counts is None else torch.split(sent, list(counts)))  # type: ignore[arg-type]
            transfer.sent, transfer.works = parts, _send_pairwise(group, parts, transfer)
        return transfer


def _send_pairwise(group: dist.ProcessGroup, sent: list[Tensor], transfer: Transfer) -> list[Any]:
    """Post every receive before any send; empty parts are not sent.

    The stock AlltoAll of gloo queues payload before it tells that it can receive, so that a rank
    that comes late gets its payload in one direction at a time.
    """
    rank, size = group.rank(), group.size()
    into = torch.split(transfer.received, transfer.sizes)
    others = [(rank + step) % size for step in range(1, size)]
    # the group's own methods: torch.distributed's wrappers would double the cost of a message
    works = [
        group.recv([into[peer]], peer, _TAG) for peer in reversed(others) if transfer.sizes[peer]
    ]
    works += [group.send([sent[peer]], peer, _TAG) for peer in others if sent[peer].numel()]
    into[rank].copy_(sent[rank])
    return works
