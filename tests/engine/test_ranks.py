"""Who the ranks are, how they find each other, and what is said when one does not come."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dmt_convert.cluster.ranks import read_layout
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


def test_a_rank_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ranks(monkeypatch, 1, 2, 1, 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="has 1 GPUs"):
        read_layout("nccl")


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
