"""Memory that can still be had: the machine's, or that of the control groups the process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
_OWN_GROUPS: Final = Path("/proc/self/cgroup")
_CGROUP: Final = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the least of what the machine and every control group has left; None: unknown."""
    found = [*_left_on_machine(), *_left_in_groups()]
    return min(found, default=None)


def gib(size: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def _left_on_machine() -> Iterator[int]:
    for line in _read(_MEMINFO).splitlines():
        words = line.split()
        if line.startswith("MemAvailable:") and len(words) > 1 and words[1].isdecimal():
            yield int(words[1]) * 1024


def _left_in_groups() -> Iterator[int]:
    """Yield what the groups of the process, and those above them, have left.

    Version 2 has one tree of groups; version 1 has a tree for memory alone.
    """
    for root, files in (
        (_CGROUP, ("memory.max", "memory.current", "inactive_file")),
        (
            _CGROUP / "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        for folder in _folders(root):
            limit, used = (_read(folder / name).strip() for name in files[:2])
            if limit.isdecimal() and used.isdecimal():
                # pages of files that nobody has mapped count as used, but are given back
                cached = _statistic(folder / "memory.stat", files[2])
                yield max(0, int(limit) - int(used) + min(cached, int(used)))


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's groups; inside a container, they are the root itself."""
    own = {root}
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "x", "/")
        if controllers == "" or "memory" in controllers.split(","):
            place = root / path.lstrip("/")
            own |= {place, *(above for above in place.parents if above.is_relative_to(root))}
    yield from sorted(own)


def _statistic(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
