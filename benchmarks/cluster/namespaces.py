"""Linux namespaces: a sealed process tree with networks of its own, with or without root.

Everything runs below one process that is the first of a new PID namespace and lives in a new
network namespace: when it ends, however it ends, the kernel kills all processes below it, and
with the last of them go the networks, their interfaces and their traffic control. Nothing is
registered outside (no `ip netns`), so there is nothing to remove.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from dmt_convert.errors import DmtError

Mode = Literal["root", "rootless"]

_CLONE_NEWNET: Final = 0x40000000
_TOOLS: Final = ("unshare", "ip", "tc")
_SEAL: Final[dict[Mode, tuple[str, ...]]] = {
    "root": ("unshare", "--fork", "--kill-child", "--net", "--pid"),
    "rootless": ("unshare", "--fork", "--kill-child", "--net", "--pid", "--map-root-user"),
}
# The kinds of interface and of traffic control that `network` builds.
_TRIAL: Final = (
    "ip link add bridge0 type bridge && ip link add port0 type veth peer name nic0 && "
    "tc qdisc add dev port0 root handle 1: htb default 20 && "
    "tc class add dev port0 parent 1: classid 1:20 htb rate 100mbit && "
    "tc qdisc add dev port0 parent 1:20 bfifo limit 64mb && "
    "tc filter add dev port0 parent 1: protocol ip u32 match u16 0 0xff00 at 2 flowid 1:20"
)


def find_mode() -> Mode:
    """Try how hosts can be built on this machine: as root, or rootless.

    Raises:
        DmtError: Neither works; it says why.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise DmtError(
            f"no {', '.join(missing)} on this machine's PATH",
            expected="a Linux machine with util-linux and iproute2, to build hosts from network "
            "namespaces",
            hint="install these two packages, such as with `apt-get install util-linux iproute2`",
        )
    modes: tuple[Mode, ...] = ("root", "rootless") if os.geteuid() == 0 else ("rootless",)
    refusals = []
    for mode in modes:
        done = subprocess.run(
            seal(mode, ["sh", "-c", _TRIAL]), capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return mode
        refusals.append(f"{mode}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    raise DmtError(
        "this kernel gives us no network namespaces with bridges, veth pairs and htb",
        expected="user namespaces for ordinary users, or root with CAP_SYS_ADMIN and CAP_NET_ADMIN",
        hint="run it as root, or allow user namespaces (sysctl user.max_user_namespaces, on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0), or run it in a virtual machine; a "
        "container needs --privileged",
        details=refusals,
    )


def seal(mode: Mode, command: Sequence[str]) -> list[str]:
    """Return the command that runs another one as the first process of new namespaces."""
    return [*_SEAL[mode], "--", *command]


class NetworkNamespace:
    """A network namespace, held open by a file descriptor of this process.

    Args:
        fd: Descriptor of the namespace; it ends with the last descriptor and process in it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def current(cls) -> NetworkNamespace:
        """The namespace that this process is in."""
        return cls(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def create(cls) -> NetworkNamespace:
        """Make an empty one, and stay where we are."""
        home = cls.current()
        _call("unshare", _CLONE_NEWNET)
        made = cls.current()
        home.join()
        os.close(home.fd)
        return made

    def join(self) -> None:
        """Move this thread there; what it starts from now on starts there."""
        _call("setns", self.fd, _CLONE_NEWNET)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be there for a while."""
        home = self.current()
        self.join()
        try:
            yield
        finally:
            home.join()
            os.close(home.fd)


def _call(function: str, *arguments: int) -> None:
    """Call libc (Python has these two functions only from 3.12 on)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")
