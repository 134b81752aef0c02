"""Which interface gloo uses where nobody named one."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from dmt_convert.cluster import network
from support.cluster.client import RunRanks

ADDRESSES = {
    "127.0.0.1": "lo",
    "127.0.1.1": "lo",
    "10.0.0.7": "ens1",
    "192.168.0.7": "eth0",
    "172.17.0.1": "docker0",
}
ROUTES = {"host0": "10.0.0.7", "master-here": "127.0.1.1", "10.0.0.8": "10.0.0.7"}


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with several networks; the other hosts are on 10.0.0.0."""
    monkeypatch.setattr(network, "local_addresses", lambda: iter(ADDRESSES.items()))
    monkeypatch.setattr(network, "own_address", lambda peer: ROUTES.get(peer, ""))
    for name in (network.GLOO_INTERFACE, network.NCCL_INTERFACE):
        # recorded, so that what is set here is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def choose(master: str, *others: str) -> str | None:
    """Be rank 0; the other ranks have these addresses."""
    store = HashStore()
    for rank, address in enumerate(others, start=1):
        store.set(f"address/{rank}", address)
    network.choose_interface(store, 0, len(others) + 1, master)
    return network.os.environ.get(network.GLOO_INTERFACE)


def test_the_way_to_the_master_is_taken() -> None:
    assert choose("host0", "10.0.0.8") == "ens1"


def test_on_the_masters_host_the_way_to_the_others_is_taken() -> None:
    """Its own name is 127.0.1.1 there, on Debian and Ubuntu."""
    assert choose("master-here", "127.0.1.1", "", "10.0.0.8") == "ens1"


def test_hosts_that_are_one_machine_meet_on_its_loopback() -> None:
    assert choose("master-here", "127.0.1.1") == "lo"


def test_what_was_named_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.GLOO_INTERFACE, "ib0")
    assert choose("host0", "10.0.0.8") == "ib0"


def test_where_there_is_no_way_gloo_decides() -> None:
    assert choose("nowhere", "") is None


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("eth0", "eth0"),
        ("eth", "eth0"),
        ("=eth", "ens1"),  # names nothing here: NCCL will say so
        ("en,eth", "ens1"),
        ("^docker,lo", "ens1"),
        ("^ens,docker", "eth0"),
        ("^=ens1", "eth0"),
        ("ens1:0", "ens1"),
    ],
)
def test_it_is_one_that_nccl_may_use(
    rule: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(network.NCCL_INTERFACE, rule)
    assert choose("host0", "10.0.0.8") == chosen


def test_addresses_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = dict(network.local_addresses())
    assert found["127.0.0.1"] == "lo"
    assert network.own_address("127.0.0.1") == "127.0.0.1"
    assert network.own_address("no such host") == ""


def test_ranks_of_several_hosts_choose_before_they_meet(run_ranks: RunRanks) -> None:
    """Two hosts that are this machine, with no interface named."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found = run_ranks(
        *(2, 1, "meet"),
        timeout_seconds=60,
        ports=[store.port],
        unset=["GLOO_SOCKET_IFNAME"],
        job={"meets": False, "environ": environ},
    )
    assert [(one["error"], one["interface"]) for one in found] == [(None, "lo")] * 2
