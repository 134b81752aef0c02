"""Which network the ranks of several hosts talk over."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
from array import array
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger(__name__)

GLOO_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
"""gloo takes whole names, with commas between them."""
NCCL_INTERFACE: Final = "NCCL_SOCKET_IFNAME"
"""NCCL takes how names begin; `=` in front means whole names, `^` all others."""
_IPV6_ADDRESSES: Final = Path("/proc/net/if_inet6")
_SIOCGIFCONF: Final = 0x8912
_IFREQ: Final = struct.Struct("16s4x4s16x")
"""The kernel's record: an interface's name, padding, an IPv4 address, padding."""
_IFCONF: Final = struct.Struct("iP")
"""What the kernel is asked with: the size of a buffer for such records, and where it is."""
_MAX_ADDRESSES: Final = 1024
_DISCARD_PORT: Final = 9


def choose_interface(store: Any, rank: int, world_size: int, master: str) -> None:
    """Let gloo use the interface that reaches the other hosts, unless its variable is set.

    gloo itself takes the interface that the host's name resolves to, which is the loopback on many
    systems, and any on hosts with several networks. All ranks call this at once.

    Args:
        store: Where the ranks meet.
        rank: This rank.
        world_size: All ranks.
        master: The name or address of the host where they meet.
    """
    own = own_address(master)
    store.set(f"address/{rank}", own)
    if GLOO_INTERFACE in os.environ:
        return
    if not own or ip_address(own).is_loopback:  # on the master's host; the others know better
        keys = [f"address/{other}" for other in range(world_size)]
        store.wait(keys)
        others = (store.get(key).decode() for key in keys)
        remote = [other for other in others if other and not ip_address(other).is_loopback]
        own = own_address(remote[0]) if remote else own
    name = _allowed_name(dict(local_addresses()), own)
    if name is not None:
        os.environ[GLOO_INTERFACE] = name
        logger.info("gloo uses the interface %s (%s is not set)", name, GLOO_INTERFACE)


def own_address(peer: str) -> str:
    """Return this host's address on the way to another one; "" if there is no way.

    Args:
        peer: The other host's name or address. Nothing is sent to it.
    """
    try:
        found = socket.getaddrinfo(peer, _DISCARD_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # of UDP: only looks up the route
                address: str = probe.getsockname()[0]
                return address.partition("%")[0]
        except OSError:
            continue
    return ""


def local_addresses() -> Iterator[tuple[str, str]]:
    """Yield all addresses of this host, with the name of the interface that has them."""
    buffer = array("B", bytes(_IFREQ.size * _MAX_ADDRESSES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = _IFCONF.pack(len(buffer), buffer.buffer_info()[0])
        length, _ = _IFCONF.unpack(fcntl.ioctl(probe, _SIOCGIFCONF, request))
    for name, address in _IFREQ.iter_unpack(buffer[:length]):
        yield socket.inet_ntoa(address), name.partition(b"\0")[0].decode().partition(":")[0]
    if _IPV6_ADDRESSES.exists():
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            words = line.split()
            yield str(ip_address(bytes.fromhex(words[0]))), words[-1]


def _allowed_name(names: Mapping[str, str], own: str) -> str | None:
    """Return the interface of an address, or another one if NCCL must not use that.

    Args:
        names: Address -> interface.
        own: This host's address, on the way to the others.
    """
    found = names.get(own)
    rule = os.environ.get(NCCL_INTERFACE)
    if not rule or (found is not None and _is_allowed(found, rule)):
        return found
    others = [name for a, name in names.items() if not ip_address(a).is_loopback]
    return next((name for name in others if _is_allowed(name, rule)), found)


def _is_allowed(name: str, rule: str) -> bool:
    excludes, rule = rule.startswith("^"), rule.removeprefix("^")
    whole, rule = rule.startswith("="), rule.removeprefix("=")
    entries = [entry.partition(":")[0] for entry in rule.split(",") if entry]
    matches = name in entries if whole else name.startswith(tuple(entries))
    return matches != excludes
