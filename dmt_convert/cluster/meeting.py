"""Where ranks meet: a store in which nothing is left of ranks that were lost.

torchrun (2.13) keeps its store when it starts the ranks again, and gloo finds there the addresses
of those that are gone: the new ranks never meet. Here they agree on a name for this meeting first,
and on a part of the store under that name. How many times a host has started its ranks would not
do: hosts count for themselves.

Letters: W ranks.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.02


def open_store(rank: int, world_size: int, limit: timedelta) -> Store:
    """Open a store for this meeting of the ranks; all ranks at once.

    Args:
        rank: This rank.
        world_size: W.
        limit: How long to wait for the others.

    Raises:
        DistStoreError: A rank did not come (torch's).
        TimeoutError: A rank did not come.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=limit))
    store.set_timeout(limit)
    shared = PrefixStore("dmt", store)
    name = _invite(shared, world_size, limit) if rank == 0 else _join(shared, rank)
    return PrefixStore(name, store)


def _invite(store: Store, world_size: int, limit: timedelta) -> str:
    """As rank 0, name the meeting, and tell all who come."""
    name, told = uuid.uuid4().hex, set()
    keys = [f"hello/{rank}" for rank in range(1, world_size)]
    if not keys:
        return name
    store.wait(keys)
    end = time.monotonic() + limit.total_seconds()
    while store.add(f"came/{name}", 0) < len(keys):
        for guest in store.multi_get(keys):  # perhaps one that is gone
            if guest not in told:
                told.add(guest)
                store.set(f"welcome/{guest.decode()}", name)
        if time.monotonic() > end:
            raise TimeoutError("some of the ranks did not come")
        time.sleep(_POLL_SECONDS)
    return name


def _join(store: Store, rank: int) -> str:
    """As another rank, learn the meeting's name."""
    guest = uuid.uuid4().hex
    store.set(f"hello/{rank}", guest)
    name: str = store.get(f"welcome/{guest}").decode()  # waits for it
    store.add(f"came/{name}", 1)
    return name
