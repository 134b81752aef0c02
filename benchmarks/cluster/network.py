"""Hosts joined by a bridge, each behind a link of limited rate.

    host 0: ranks - eth0 ====== port0 -+
    host 1: ranks - eth0 ====== port1 -+- bridge, in a namespace of its own
    ...

`eth0` limits what the host sends, its port on the bridge what the host receives. Ranks of one
host reach each other by the same address as all others, and yet over the loopback interface:
that is how Linux treats a machine's own addresses. So the link carries what crosses hosts only.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dmt_convert.errors import DmtError

from .namespaces import NetworkNamespace

NIC: Final = "eth0"
GOODPUT: Final = 0.956
"""Share of the nominal rate that is payload: 40 bytes of headers and 14 of Ethernet per 1500,
and what TCP's own control leaves idle."""

_SUBNET: Final = "10.77.0"
_GSO_BYTES: Final = 16 * 1024
_BUFFER: Final = "64mb"
_MIN_BURST_BYTES: Final = 20 * 1024
_BURST_SECONDS: Final = 0.001


class ClusterNetwork:
    """The bridge in the namespace that we are in, and a new namespace for every host.

    Args:
        num_hosts: H.
    """

    def __init__(self, num_hosts: int) -> None:
        self.hosts = [NetworkNamespace.create() for _ in range(num_hosts)]
        _run("ip link add bridge0 type bridge mcast_snooping 0")
        _run("ip link set bridge0 addrgenmode none up")
        for host in range(num_hosts):
            self._join_host(host)

    def _join_host(self, host: int) -> None:
        namespace, port = self.hosts[host], f"port{host}"
        there = f"/proc/self/fd/{namespace.fd}"
        _run(f"ip link add {port} type veth peer name {NIC} netns {there}", namespace.fd)
        _run(f"ip link set {port} addrgenmode none master bridge0")
        _prepare(port)
        with namespace.entered():
            _run("ip link set lo up")
            _run(f"ip link set {NIC} addrgenmode none")
            _run(f"ip address add {address(host)}/24 dev {NIC}")
            _prepare(NIC)

    def set_rate(self, mbit: float) -> None:
        """Change the rate of every link, in both directions."""
        for host, namespace in enumerate(self.hosts):
            _limit(f"port{host}", mbit)
            with namespace.entered():
                _limit(NIC, mbit)


def address(host: int) -> str:
    """IP address of a host."""
    return f"{_SUBNET}.{host + 1}"


def _prepare(device: str) -> None:
    """Two queues: small packets (acknowledgements, notes) go before payload, all are kept."""
    _run(f"ip link set {device} gso_max_size {_GSO_BYTES} gro_max_size {_GSO_BYTES} up")
    _run(f"tc qdisc add dev {device} root handle 1: htb default 20")
    _limit(device, 1000)
    for queue in (10, 20):
        _run(f"tc qdisc add dev {device} parent 1:{queue} handle {queue}: bfifo limit {_BUFFER}")
    # u32 at 2: an IP packet whose length has no bit above 255
    _run(
        f"tc filter add dev {device} parent 1: protocol ip prio 1 "
        "u32 match u16 0x0000 0xff00 at 2 flowid 1:10"
    )


def _limit(device: str, mbit: float) -> None:
    burst = max(_MIN_BURST_BYTES, round(mbit * 1e6 / 8 * _BURST_SECONDS))
    whole, small, large = (f"{share * mbit * 1000:.0f}kbit" for share in (1, 0.1, 0.9))
    rest = f"ceil {whole} burst {burst} cburst {burst} quantum {_GSO_BYTES}"
    for place, rate, priority in (
        ("parent 1: classid 1:1", whole, ""),
        ("parent 1:1 classid 1:10", small, "prio 0"),
        ("parent 1:1 classid 1:20", large, "prio 1"),
    ):
        _run(f"tc class replace dev {device} {place} htb rate {rate} {rest} {priority}")


def _run(command: str, *pass_fds: int) -> None:
    done = subprocess.run(
        command.split(), pass_fds=pass_fds, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DmtError(
            f"`{command}` failed with exit code {done.returncode}",
            expected="a kernel with bridges, veth pairs, htb, bfifo and u32, and iproute2 5.19 or "
            "newer",
            hint="try another machine, or a virtual one",
            details=done.stderr.strip().splitlines(),
        )


def read_counters(interfaces: Sequence[str] = (NIC, "lo")) -> dict[str, tuple[int, int]]:
    """Return (received, sent) bytes of interfaces of the calling process's namespace."""
    return parse_counters(Path("/proc/self/net/dev").read_text(), interfaces)


def parse_counters(text: str, interfaces: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Read the kernel's table of interfaces (`/proc/net/dev`)."""
    found = {}
    for name in interfaces:
        match = re.search(rf"^\s*{re.escape(name)}:(.*)$", text, re.MULTILINE)
        assert match is not None, f"no interface {name} in {text}"
        columns = match[1].split()
        found[name] = (int(columns[0]), int(columns[8]))
    return found
