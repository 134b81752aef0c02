"""The processes that train together: who they are, how they find each other.

Letters: H hosts, R ranks per host, W = H * R world size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from dmt_convert.errors import ConfigError

_NAMES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_POD: Final = "TORCHREC_RESOLVED_POD_SIZE"


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
        return f"cuda:{self.local_rank}" if self.backend == "nccl" else "cpu"


def read_layout(backend: Literal["nccl", "gloo"] | None = None) -> RankLayout:
    """Read what torchrun says of this process.

    Args:
        backend: nccl for GPUs, gloo for CPUs; by default what the machine has.

    Raises:
        ConfigError: The environment is not one that torchrun sets.
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
    if backend is None:
        import torch

        backend = "nccl" if torch.cuda.is_available() else "gloo"
    layout = RankLayout(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        ranks_per_host=values["LOCAL_WORLD_SIZE"],
        backend=backend,
    )
    _check(layout)
    return layout


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
    if layout.backend == "nccl":
        import torch

        found = torch.cuda.device_count()
        if layout.local_rank >= found:
            raise ConfigError(
                f"rank {layout.rank} is number {layout.local_rank} on its host, which has {found} "
                "GPUs",
                expected="a GPU per rank",
                hint=f"lower --nproc-per-node to {found}, or use --backend gloo",
            )


def start_ranks(layout: RankLayout, *, hosts_per_tower: int, timeout_seconds: float) -> None:
    """Let the ranks find each other; all ranks at once.

    Args:
        layout: This rank.
        hosts_per_tower: Hosts that share a tower (the plan's).
        timeout_seconds: How long to wait for ranks, here and in every later exchange.

    Raises:
        ConfigError: A rank did not come.
    """
    import torch
    import torch.distributed as dist

    from dmt_convert.cluster.meeting import open_store

    os.environ[_POD] = str(hosts_per_tower)  # TorchRec reads it when it makes its groups
    if layout.backend == "nccl":
        torch.cuda.set_device(layout.local_rank)
    limit = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            layout.backend,
            timeout=limit,
            store=open_store(layout.rank, layout.world_size, limit),
            rank=layout.rank,
            world_size=layout.world_size,
        )
        dist.monitored_barrier(timeout=limit) if layout.backend == "gloo" else dist.barrier()
        _make_groups(limit)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the {layout.world_size} ranks did not all come within {timeout_seconds:g} s "
            f"({reason})",
            expected="every rank to be started, and its host to reach "
            f"{os.environ.get('MASTER_ADDR', 'the master')}",
            hint="look at the other hosts' output; on hosts with several networks set "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        ) from None


def _make_groups(limit: timedelta) -> None:
    """Make the groups that TorchRec would make, which gives them half an hour to answer."""
    import torch.distributed as dist
    from torchrec.distributed import comm

    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = comm.get_topology_group_world_size(world_size)
    inside = [list(range(first, first + size)) for first in range(0, world_size, size)]
    across = [list(range(first, world_size, size)) for first in range(size)]
    for name, groups in (("_INTRA_PG", inside), ("_CROSS_PG", across)):
        made = {tuple(ranks): dist.new_group(ranks, timeout=limit) for ranks in groups}
        setattr(comm, name, next(group for ranks, group in made.items() if rank in ranks))


def stop_ranks() -> None:
    """Take leave of the other ranks."""
    import torch.distributed as dist
    from torchrec.distributed import comm

    if dist.is_initialized():
        dist.destroy_process_group()
    comm._INTRA_PG = comm._CROSS_PG = None
