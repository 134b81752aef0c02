"""What a reader is: how one format is recognised and opened. Checkpoints and data sets have some.

Readers stand in a tuple and are asked in its order. Those of plugins are asked before: a plugin
may know more about a path than the reader of a general format that would take it too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dmt_convert.errors import DmtError
from dmt_convert.plugins import Plugin, load_plugins

Opened = TypeVar("Opened")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader(Generic[Opened]):
    """How one format is recognised and opened."""

    format: str
    """Name of the format."""
    can_read: Callable[[Path], bool]
    """Tells by names and first bytes whether a path holds the format; unpickles nothing."""
    read: Callable[[Path], Opened]
    """Opens a path: reads headers only, if the format has any. Raises a `DmtError`."""


def with_plugins(
    readers: tuple[Reader[Opened], ...], *, group: str, opens: type[Opened]
) -> tuple[Reader[Opened], ...]:
    """Return the readers of plugins, then those given.

    Args:
        readers: The built-in readers.
        group: Group of entry points that plugins add their readers to.
        opens: What `read` returns.

    Raises:
        ConfigError: A plugin cannot be loaded, is not a reader, or uses the name of another format.
    """
    owners = {reader.format: "dmt-convert itself" for reader in readers}
    added = []
    for plugin in sorted(load_plugins(group), key=lambda plugin: plugin.distribution):
        reader = plugin.value
        if not isinstance(reader, Reader):
            raise plugin.refuse(
                f"is a {type(reader).__name__}", expected="a dmt_convert.readers.Reader"
            )
        if reader.format in owners:
            raise plugin.refuse(
                f"reads the format {reader.format!r}, a name that {owners[reader.format]} uses",
                expected="a name of its own for every format",
            )
        owners[reader.format] = plugin.distribution
        added.append(_guarded(plugin, reader, opens))
    return (*added, *readers)


def _guarded(plugin: Plugin, reader: Reader[Any], opens: type[Opened]) -> Reader[Opened]:
    """Let a plugin's reader fail with an error that names its distribution."""

    def call(function: Callable[[Path], object], path: Path) -> object:
        try:
            return function(path)
        except (DmtError, OSError):
            raise
        except Exception as error:  # a bug of the plugin's, not of ours
            raise plugin.refuse(
                f"failed on {path} ({type(error).__name__}: {error})",
                expected="a reader that opens its files, or says what is wrong with them",
            ) from error

    def can_read(path: Path) -> bool:
        return bool(call(reader.can_read, path))

    def read(path: Path) -> Opened:
        _log.info("%s: format %r, read by %s", path, reader.format, plugin.distribution)
        opened = call(reader.read, path)
        if not isinstance(opened, opens):
            raise plugin.refuse(
                f"returned a {type(opened).__name__}", expected=f"a {opens.__name__}"
            )
        return opened

    return Reader(format=reader.format, can_read=can_read, read=read)
