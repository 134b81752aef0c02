"""Who the ranks are, how they find each other, and what is said when one does not come."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from dmt_convert.cluster import gpus, ranks
from dmt_convert.cluster.faults import GpuMemoryError
from dmt_convert.cluster.ranks import (
    RankLayout,
    _refuse_shared_gpus,
    read_layout,
    start_ranks,
    stop_ranks,
)
from dmt_convert.errors import ConfigError
from support.cluster.client import RunRanks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def set_ranks(monkeypatch: pytest.MonkeyPatch, *values: object) -> None:
    for name, value in zip(NAMES, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))


def test_what_torchrun_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ranks(monkeypatch, 5, 8, 1, 4)
    layout = read_layout("gloo")
    assert (layout.rank, layout.hosts, layout.ranks_per_host) == (5, 2, 4)
    assert (layout.device_type, layout.device) == ("cpu", "cpu")
    on_gpus = type(layout)(rank=5, world_size=8, local_rank=1, ranks_per_host=4, backend="nccl")
    assert (on_gpus.device_type, on_gpus.device) == ("cuda", "cuda:1")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((None, None, None, None), "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE missing"),
        ((0, None, 0, 1), "WORLD_SIZE missing or wrong"),
        ((0, "two", 0, 1), "WORLD_SIZE='two' missing or wrong"),
        ((-1, 2, 0, 1), "RANK='-1' missing or wrong"),
        ((0, 6, 0, 4), "rank 0 of 6, 4 on each host"),
        ((4, 4, 0, 2), "rank 4 of 4"),
        ((0, 0, 0, 1), "rank 0 of 0"),
        ((0, 2, 0, 0), "0 on each host"),
        ((0, 2, 0, 4), "rank 0 of 2, 4 on each host"),
    ],
)
def test_what_torchrun_cannot_have_said_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: tuple[object, ...], says: str
) -> None:
    set_ranks(monkeypatch, *values)
    with pytest.raises(ConfigError, match="torchrun") as refused:
        read_layout("gloo")
    assert says in str(refused.value)


def set_gpus(
    monkeypatch: pytest.MonkeyPatch, devices: Path, *, count: int, files: int, visible: str | None
) -> None:
    """Let this host have `files` GPUs, of which torch can use `count`."""
    for number in range(files):
        (devices / f"nvidia{number}").touch()
    (devices / "nvidiactl").touch()
    monkeypatch.setattr(gpus, "_DEVICES", devices)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize("visible", [None, "0,1", "-1"])
def test_a_rank_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None
) -> None:
    set_ranks(monkeypatch, 1, 2, 1, 2)
    set_gpus(monkeypatch, tmp_path, count=1, files=1, visible=visible)
    with pytest.raises(ConfigError, match="has 1 GPUs"):
        read_layout("nccl")


@pytest.mark.parametrize("visible", ["3", "GPU-8f1c"])
def test_a_task_that_sees_one_gpu_takes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str
) -> None:
    set_ranks(monkeypatch, 3, 4, 3, 4)
    set_gpus(monkeypatch, tmp_path, count=1, files=4, visible=visible)
    assert read_layout().device == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert read_layout().device == "cuda:3"


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nMore.")


def test_gpus_that_torch_cannot_use_are_no_silent_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_ranks(monkeypatch, 0, 2, 0, 2)
    set_gpus(monkeypatch, tmp_path, count=0, files=2, visible=None)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for backend in (None, "nccl"):
        with pytest.raises(ConfigError) as refused:
            read_layout(backend)
        assert refused.value.found.endswith("is too old (found version 12040).")
        assert "580 or newer" in refused.value.expected
        assert "--backend gloo" in refused.value.hint
    assert read_layout("gloo").device == "cpu"  # that is what was asked for


def test_a_build_for_cpus_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_ranks(monkeypatch, 0, 1, 0, 1)
    set_gpus(monkeypatch, tmp_path, count=0, files=1, visible=None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="NVIDIA GPUs") as refused:
        read_layout()
    assert refused.value.expected == "a build of torch for CUDA"
    assert ".[cuda]" in refused.value.hint


@pytest.mark.parametrize(("files", "visible"), [(0, None), (2, ""), (2, "-1"), (2, "NoDevFiles")])
def test_without_gpus_or_with_hidden_ones_training_is_on_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: int, visible: str | None
) -> None:
    set_ranks(monkeypatch, 0, 1, 0, 1)
    set_gpus(monkeypatch, tmp_path, count=0, files=files, visible=visible)
    assert str(read_layout()) == "1 host x 1 rank on CPUs, gloo"


def test_ranks_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8f1c")
    )
    store = HashStore()
    for rank, uuid in enumerate(("1111", "8f1c", "2222")):
        store.set(f"gpu/{rank}", uuid)
    layout = RankLayout(rank=3, world_size=4, local_rank=1, ranks_per_host=2, backend="nccl", gpu=0)
    with pytest.raises(ConfigError, match="ranks 1, 3 were given the same GPU") as refused:
        _refuse_shared_gpus(store, layout)
    assert "CUDA_VISIBLE_DEVICES" in refused.value.hint
    store.set("gpu/1", "3333")
    _refuse_shared_gpus(store, layout)


LIMIT = timedelta(seconds=20)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be the only rank, and able to meet."""
    set_ranks(monkeypatch, 0, 1, 0, 1)
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
        ("GLOO_SOCKET_IFNAME", "lo"),
        ("TORCHREC_RESOLVED_POD_SIZE", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    yield
    stop_ranks()


def test_nccl_is_told_its_device_and_every_group_is_used(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in: gloo for NCCL, this CPU for the GPU."""
    called: list[tuple[str, Any]] = []
    really = dist.init_process_group

    def init(backend: str, *, device_id: object, **options: Any) -> None:
        called.append((backend, device_id))
        really("gloo", **options)

    def warm_up(device: object, *arguments: Any) -> None:
        called.append(("warm up", device))
        really_warm_up(torch.device("cpu"), *arguments)

    really_warm_up = ranks._warm_up
    monkeypatch.setattr(ranks, "_warm_up", warm_up)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(ranks, "_refuse_shared_gpus", lambda *_: called.append(("uuids", None)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("set", device)))
    layout = RankLayout(rank=0, world_size=1, local_rank=3, ranks_per_host=1, backend="nccl", gpu=2)
    start_ranks(layout, hosts_per_tower=1, timeout=LIMIT)
    device = torch.device("cuda:2")
    assert called == [("set", device), ("uuids", None), ("nccl", device), ("warm up", device)]


def test_a_group_that_cannot_be_used_fails_the_start(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    really = dist.all_to_all_single

    def exchange(received: Any, sent: Any, *, group: Any, async_op: bool) -> Any:
        used.append(group)
        if len(used) == 2:
            raise dist.DistBackendError(
                "NCCL error in: x.cpp:3690, unhandled system error, NCCL version 2.27.5\n"
                "ncclSystemError: System call or external library call failed.\nLast error:\n"
                "socketPollConnect: connect to 10.0.0.2<43> returned Connection refused\n"
            )
        return really(received, sent, group=group, async_op=async_op)

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    layout = read_layout("gloo")
    with pytest.raises(ConfigError, match="returned Connection refused") as refused:
        start_ranks(layout, hosts_per_tower=1, timeout=LIMIT)
    assert "NCCL_SOCKET_IFNAME" in refused.value.hint
    from torchrec.distributed import comm

    assert used == [comm._INTRA_PG, comm._CROSS_PG]


def test_memory_that_is_missing_at_the_start_is_no_lost_rank(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. If reserved")

    monkeypatch.setattr(ranks, "_warm_up", no_memory)
    with pytest.raises(GpuMemoryError, match="rank 0: CUDA out of memory"):
        start_ranks(read_layout("gloo"), hosts_per_tower=1, timeout=LIMIT)


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that is taken, but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_rank_that_never_comes(run_ranks: RunRanks, deaf_port: int, present: int) -> None:
    """Rank 0 waits where the others are to come; rank 1 finds nobody there."""
    environ = {
        "RANK": str(present),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0" if present == 0 else str(deaf_port),
    }
    job = {"meets": False, "environ": environ}
    (found,) = run_ranks(1, 1, "meet", timeout_seconds=2, job=job)
    assert "the 2 ranks did not all come within 2 s" in found["error"]
    assert "127.0.0.1" in found["error"]
    assert "GLOO_SOCKET_IFNAME" in found["error"]
    assert found["seconds"] < 20, "seen: 2 to 4 s"


@pytest.mark.parametrize(
    ("hosts_per_tower", "inside", "across"),
    [(1, [[0, 1], [2, 3]], [[0, 2], [1, 3]]), (2, [[0, 1, 2, 3]], [[0], [1], [2], [3]])],
)
def test_ranks_meet_and_part_and_meet_again(
    run_ranks: RunRanks, hosts_per_tower: int, inside: list[list[int]], across: list[list[int]]
) -> None:
    from torch.distributed import TCPStore

    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    environ = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found = run_ranks(
        2,
        2,
        "meet",
        timeout_seconds=60,
        hosts_per_tower=hosts_per_tower,
        ports=[store.port for store in stores],
        job={"meets": False, "environ": environ},
    )
    for rank, one in enumerate(found):
        assert one["error"] is None
        mine = [next(g for g in groups if rank in g) for groups in (inside, across)]
        assert one["groups"] == [mine, mine]
