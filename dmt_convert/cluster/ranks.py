"""The processes that train together: who they are, how they meet, what they do as one.

Letters: H hosts, R ranks per host, W = H * R world size.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, Final, Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    DebugLevel,
    PrefixStore,
    Store,
    TCPStore,
    get_debug_level,
    set_debug_level,
)
from torch.distributed.rendezvous import rendezvous

from dmt_convert.cluster.faults import PeerFailedError, explain_gpu, reason
from dmt_convert.cluster.gpus import has_gpus, sees_one_gpu, unusable_error
from dmt_convert.cluster.network import choose_interface
from dmt_convert.errors import ConfigError, DmtError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up."""
_NAMES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_POD: Final = "TORCHREC_RESOLVED_POD_SIZE"
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """One rank among W."""

    rank: int
    """This rank."""
    world_size: int
    """W."""
    local_rank: int
    """This rank's index on its host."""
    ranks_per_host: int
    """R."""
    backend: Literal["nccl", "gloo"]
    """How ranks talk."""
    gpu: int | None = None
    """Index of its GPU among those that it sees; None: its local rank."""

    def __str__(self) -> str:
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        ranks = "1 rank" if self.ranks_per_host == 1 else f"{self.ranks_per_host} ranks"
        places = "GPUs" if self.device_type == "cuda" else "CPUs"
        return f"{hosts} x {ranks} on {places}, {self.backend}"

    @property
    def hosts(self) -> int:
        """H."""
        return self.world_size // self.ranks_per_host

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        """Where tables and modules live."""
        return "cuda" if self.backend == "nccl" else "cpu"

    @property
    def device(self) -> str:
        """This rank's device, as torch names it."""
        if self.device_type == "cpu":
            return "cpu"
        return f"cuda:{self.local_rank if self.gpu is None else self.gpu}"


def read_layout(backend: Literal["nccl", "gloo"] | None = None) -> RankLayout:
    """Read what torchrun says of this process.

    Args:
        backend: nccl for GPUs, gloo for CPUs; by default what the machine has.

    Raises:
        ConfigError: The environment is not one that torchrun sets, or GPUs are there, or asked for,
            that cannot be used.
    """
    values: dict[str, int] = {}
    missing = [name for name in _NAMES if name not in os.environ]
    for name in _NAMES:
        text = os.environ.get(name, "0")
        if text.isdecimal():
            values[name] = int(text)
        else:
            missing.append(f"{name}={text!r}")
    if missing:
        raise ConfigError(
            f"this process was not started by torchrun: {', '.join(missing)} missing or wrong",
            expected="the variables " + ", ".join(_NAMES),
            hint="start it with torchrun, or with `dmt finetune`",
        )
    layout = RankLayout(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        ranks_per_host=values["LOCAL_WORLD_SIZE"],
        backend=backend or _default_backend(),
    )
    _check(layout)
    return replace(layout, gpu=_choose_gpu(layout)) if layout.backend == "nccl" else layout


def _default_backend() -> Literal["nccl", "gloo"]:
    """Return nccl where there are GPUs; training must not move to CPUs without a word."""
    if torch.cuda.is_available():
        return "nccl"
    if has_gpus():
        raise unusable_error("this host has NVIDIA GPUs")
    return "gloo"


def _check(layout: RankLayout) -> None:
    if (
        not 0 <= layout.rank < layout.world_size
        or layout.ranks_per_host < 1
        or layout.world_size % layout.ranks_per_host
    ):
        raise ConfigError(
            f"rank {layout.rank} of {layout.world_size}, {layout.ranks_per_host} on each host",
            expected="as many ranks on every host",
            hint="give torchrun the same --nproc-per-node everywhere",
        )


def _choose_gpu(layout: RankLayout) -> int:
    """Return the index of this rank's GPU among those that it sees."""
    found = torch.cuda.device_count()
    if found == 0:
        raise unusable_error("--backend nccl needs GPUs")
    if layout.local_rank < found:
        return layout.local_rank
    if found == 1 and sees_one_gpu():
        return 0  # that of this task; `_refuse_shared_gpus` makes sure that it is no other's
    raise ConfigError(
        f"rank {layout.rank} is number {layout.local_rank} on its host, which has {found} GPUs",
        expected="a GPU per rank",
        hint=f"lower --nproc-per-node to {found}, or use --backend gloo",
    )


def start_ranks(layout: RankLayout, *, hosts_per_tower: int, timeout: timedelta) -> Ranks:
    """Let the ranks find each other, and make their process groups; all ranks at once.

    Args:
        layout: This rank.
        hosts_per_tower: Hosts that share a tower (the plan's).
        timeout: How long to wait for ranks, here and in every later exchange.

    Returns:
        All ranks, for what they do together beside training.

    Raises:
        ConfigError: A rank did not come.
    """
    os.environ[_POD] = str(hosts_per_tower)  # TorchRec reads it when it makes its groups
    if layout.backend == "gloo" and get_debug_level() == DebugLevel.DETAIL:
        set_debug_level(DebugLevel.INFO)
        logger.warning(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL is lowered to INFO: torch %s crashes with it on CPUs",
            torch.__version__,
        )
    try:
        return _start(layout, timeout)
    except (dist.DistError, RuntimeError, OSError) as error:
        told = explain_gpu(error, layout.rank)
        raise told or ConfigError(
            f"the {layout.world_size} ranks did not all come within "
            f"{timeout.total_seconds():g} s ({reason(error)})",
            expected="every rank to be started, and its host to reach "
            f"{os.environ.get('MASTER_ADDR', 'the master')}",
            hint="look at the other hosts' output; on hosts with several networks set "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        ) from None


def _start(layout: RankLayout, timeout: timedelta) -> Ranks:
    """Make the process groups, and use each once: what is wrong with the network shows here."""
    is_gloo = layout.backend == "gloo"
    device = torch.device(layout.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL, and tensors that name no index, take this one
    store = _open_store(layout.rank, layout.world_size, timeout)
    if device.type == "cuda":
        _refuse_shared_gpus(store, layout)
    if layout.hosts > 1:
        master = os.environ.get("MASTER_ADDR", "")
        choose_interface(store, layout.rank, layout.world_size, master)
    dist.init_process_group(
        layout.backend,
        timeout=timeout,
        store=store,
        rank=layout.rank,
        world_size=layout.world_size,
        device_id=None if is_gloo else device,  # NCCL then connects now, and splits later groups
    )
    if is_gloo:
        dist.monitored_barrier(timeout=timeout)
    inside, across = _make_groups(timeout)
    ranks = Ranks(timeout=timeout)
    ranks.on_all(lambda: None)
    _warm_up(device, inside, across, timeout)
    return ranks


def _refuse_shared_gpus(store: Store, layout: RankLayout) -> None:
    """Refuse ranks that were given the same GPU; all ranks at once."""
    properties: Any = torch.cuda.get_device_properties(layout.device)
    store.set(f"gpu/{layout.rank}", str(properties.uuid))
    keys = [f"gpu/{rank}" for rank in range(layout.world_size)]
    store.wait(keys)
    gpus = store.multi_get(keys)
    for gpu in dict.fromkeys(gpus):
        sharing = [str(rank) for rank, other in enumerate(gpus) if other == gpu]
        if len(sharing) > 1:
            raise ConfigError(
                f"ranks {', '.join(sharing)} were given the same GPU ({gpu.decode()})",
                expected="a GPU of its own for every rank",
                hint="look at what sets CUDA_VISIBLE_DEVICES; lower --nproc-per-node, or use "
                "--backend gloo",
            )


def _make_groups(timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make the groups that TorchRec would make, with our timeout: its own is half an hour.

    Every rank makes every group, in one order: `new_group` is collective over all ranks.

    Returns:
        This rank's group inside its host (or hosts of a tower), and that across hosts.
    """
    from torchrec.distributed import comm

    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = comm.get_topology_group_world_size(world_size)
    inside = [list(range(first, first + size)) for first in range(0, world_size, size)]
    across = [list(range(first, world_size, size)) for first in range(size)]
    mine = []
    for name, groups in (("_INTRA_PG", inside), ("_CROSS_PG", across)):
        made = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in groups}
        mine.append(next(group for ranks, group in made.items() if rank in ranks))
        setattr(comm, name, mine[-1])
    return mine[0], mine[1]


def _warm_up(
    device: torch.device, inside: dist.ProcessGroup, across: dist.ProcessGroup, timeout: timedelta
) -> None:
    """Use every group once, as training will: backends connect peers when they first talk."""
    dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(timeout)
    for group in (inside, across):
        sent = torch.zeros(dist.get_world_size(group), device=device)
        work = dist.all_to_all_single(torch.empty_like(sent), sent, group=group, async_op=True)
        work.wait(timeout)


def stop_ranks() -> None:
    """Destroy all process groups."""
    from torchrec.distributed import comm

    if dist.is_initialized():
        dist.destroy_process_group()
    comm._INTRA_PG = comm._CROSS_PG = None


# torchrun (2.13) keeps its store when it starts the ranks again, and gloo finds the addresses of
# the ranks before them there: the new ones would never meet. So the ranks agree on a name for this
# rendezvous first, and use the part of the store under that name. The number of restarts would not
# do for a name: every host counts its own.


def _open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Open a store in which nothing is left of ranks that were lost; all ranks at once.

    Raises:
        DistStoreError: A rank did not come (torch's).
        TimeoutError: A rank did not come.
    """
    store = _open_shared_store(rank, world_size, timeout)
    store.set_timeout(timeout)
    shared = PrefixStore("dmt", store)
    name = _name_rendezvous(shared, world_size, timeout) if rank == 0 else _learn_name(shared, rank)
    return PrefixStore(name, store)


def _open_shared_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Open the store that torchrun names; one on the loopback hears this host only."""
    address = os.environ.get("MASTER_ADDR", "")
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not agent_has_it and is_loopback(address):
        return host_store(address, int(os.environ["MASTER_PORT"]), timeout)
    opened: tuple[Store, int, int] = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return opened[0]


def is_loopback(address: str) -> bool:
    """Whether an address, not a name, is one that other hosts cannot reach."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def host_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Host a store that listens on one address; torch's own listens on all.

    Args:
        address: An IP address of this host.
        port: Where to listen; 0: any free port.
        timeout: How long to wait for what is not there yet.
    """
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    port = listening.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listening.detach(),
    )


def _name_rendezvous(store: Store, world_size: int, timeout: timedelta) -> str:
    """As rank 0, name the rendezvous, and wait until all other ranks know the name."""
    name, answered = uuid.uuid4().hex, set()
    keys = [f"arrived/{rank}" for rank in range(1, world_size)]
    if not keys:
        return name
    store.wait(keys)
    end = time.monotonic() + timeout.total_seconds()
    while store.add(f"joined/{name}", 0) < len(keys):
        for process in store.multi_get(keys):  # perhaps of a rank that is gone; a new one follows
            if process not in answered:
                answered.add(process)
                store.set(f"name for/{process.decode()}", name)
        if time.monotonic() > end:
            raise TimeoutError("some of the ranks did not come")
        time.sleep(_POLL_SECONDS)
    return name


def _learn_name(store: Store, rank: int) -> str:
    """As another rank, learn the rendezvous's name."""
    process = uuid.uuid4().hex
    store.set(f"arrived/{rank}", process)
    name: str = store.get(f"name for/{process}").decode()  # waits for it
    store.add(f"joined/{name}", 1)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What came of some work on one rank; crosses to others."""

    value: Any = None
    """What it gave."""
    refusal: DmtError | None = None
    """Something that the user can mend."""
    fault: str | None = None
    """The traceback of anything else."""

    def unwrap(self, rank: int) -> Any:
        """Return the value, or raise what was raised on `rank`."""
        if self.refusal is not None:
            raise self.refusal
        if self.fault is not None:
            raise PeerFailedError(f"rank {rank} failed:\n{self.fault}")
        return self.value


class Ranks:
    """Ranks that succeed or fail together: what goes wrong on one is raised on all.

    Objects travel over a gloo group of their own, on the CPU, so that they neither mix with the
    training's collectives nor need a GPU. Making one is collective over all ranks of the group.

    Args:
        group: Which ranks; None: all.
        timeout: How long a rank waits for the others before it gives up with a RuntimeError.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        members = None if group is None else dist.get_process_group_ranks(group)
        self.group = dist.new_group(
            members,
            backend="gloo",
            timeout=timeout,
            use_local_synchronization=group is not None,
        )
        self.timeout = timeout
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints for all."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank only; all get its result.

        Raises:
            DmtError: It was raised there; on all ranks alike.
            RuntimeError: Anything else was raised there, or a rank is lost.
        """
        error: Exception | None = None
        boxes: list[_Outcome | None] = [None]
        if self.is_first:
            boxes[0], error = _attempt(work)
        first = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(boxes, src=first, group=self.group)
        if error is not None:
            raise error
        assert boxes[0] is not None
        result: T = boxes[0].unwrap(0)
        return result

    def on_first_slowly(self, work: Callable[[], T]) -> T:
        """Do something on the first rank that may take longer than ranks wait for each other.

        Meanwhile, a thread of the first rank sends a heartbeat to the others.

        Raises:
            DmtError: It was raised there; on all ranks alike.
            RuntimeError: Anything else was raised there, or a rank is lost.
        """
        if not self.is_first:
            while not self.on_first(lambda: True):
                pass
            return self.on_first(work)
        done = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="heartbeat") as pool:
            heartbeat = pool.submit(self._send_heartbeats, done)
            found, error = _attempt(work)
            done.set()
            heartbeat.result()

        def give() -> T:
            if error is not None:
                raise error
            value: T = found.value
            return value

        return self.on_first(give)

    def _send_heartbeats(self, done: threading.Event) -> None:
        while not done.wait(self.timeout.total_seconds() / 4):
            self.on_first(lambda: False)
        self.on_first(lambda: True)

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank; all get the results, in the order of ranks.

        Raises:
            DmtError: It was raised on some rank; the first such rank's, on all alike.
            RuntimeError: Anything else was raised on some rank, or a rank is lost.
        """
        mine, error = _attempt(work)
        found: list[_Outcome | None] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        outcomes = [outcome for outcome in found if outcome is not None]
        for rank, outcome in enumerate(outcomes):
            if rank == self.rank and error is not None:
                raise error
            outcome.unwrap(rank)
        return [outcome.value for outcome in outcomes]

    def start_max(self, value: int) -> Callable[[], int]:
        """Begin to find the largest value over ranks; returns what waits for it and gives it.

        Meanwhile, the ranks may do other things together, in the same order on all.
        """
        box = torch.tensor([value], dtype=torch.int32)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group, async_op=True)

        def result() -> int:
            work.wait()
            return int(box)

        return result

    def close(self) -> None:
        """Destroy the group; nothing can be done together afterwards."""
        dist.destroy_process_group(self.group)


def _attempt(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    try:
        return _Outcome(value=work()), None
    except DmtError as error:
        return _Outcome(refusal=error), error
    except Exception as error:
        return _Outcome(fault=traceback.format_exc()), error
