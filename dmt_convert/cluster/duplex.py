"""Messages among ranks, full duplex: every receive is posted before any send.

The stock AlltoAll of gloo queues payload before it tells that it can receive, so that a rank that
comes late gets its payload in one direction at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

_TAG = 0


def swap(
    group: dist.ProcessGroup, sent: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Any]]:
    """Send every rank its part, and receive one from each; empty parts are not sent.

    Args:
        group: The ranks.
        sent: One contiguous, flat tensor per rank, all of one type.
        sizes: Elements that come from every rank.

    Returns:
        What comes, one tensor per rank, valid once all works are waited for (one's own part is
        the one sent); and the works.
    """
    rank, size = group.rank(), group.size()
    received = [
        sent[rank] if peer == rank else sent[0].new_empty(n) for peer, n in enumerate(sizes)
    ]
    others = [(rank + step) % size for step in range(1, size)]
    # the group's own methods: torch.distributed's wrappers cost as much again
    works = [group.recv([received[peer]], peer, _TAG) for peer in reversed(others) if sizes[peer]]
    works += [group.send([sent[peer]], peer, _TAG) for peer in others if sent[peer].numel()]
    return received, works
