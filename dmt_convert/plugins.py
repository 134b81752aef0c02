"""What other installed packages add to this one, through their entry points."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from dmt_convert.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One entry point of another package, loaded."""

    group: str
    """Group of the entry point, such as `dmt_convert.families`."""
    name: str
    """Name of the entry point."""
    distribution: str
    """Name and version of the package that declares it."""
    value: Any
    """The object to which it points."""

    def refuse(self, found: str, *, expected: str) -> ConfigError:
        """Return the error for a plugin that cannot be used.

        Args:
            found: What is wrong with it; continues a sentence that names the plugin.
            expected: What the group expects.
        """
        return _refuse(self.group, self.name, self.distribution, found, expected)


def load_plugins(group: str) -> tuple[Plugin, ...]:
    """Load all entry points of a group.

    Args:
        group: Name of the group.

    Raises:
        ConfigError: One of them cannot be imported. The error names the package.
    """
    return _load(group, tuple(sys.path))


@cache  # reading the metadata of all packages takes 20 ms; it can only change with the path
def _load(group: str, _path: tuple[str, ...]) -> tuple[Plugin, ...]:
    plugins = []
    for entry in metadata.entry_points(group=group):
        package = "an unknown package"
        if entry.dist is not None:
            package = f"{entry.dist.name} {entry.dist.version}"
        try:
            value = entry.load()
        except Exception as error:  # whatever the other package's own code raises
            found = f"cannot be loaded from {entry.value!r} ({type(error).__name__}: {error})"
            raise _refuse(group, entry.name, package, found, "an object to import") from error
        plugins.append(Plugin(group=group, name=entry.name, distribution=package, value=value))
    return tuple(plugins)


def _refuse(group: str, name: str, package: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"the plugin {name!r} of {package} ({group}) {found}",
        expected=expected,
        hint=f"upgrade or uninstall {package.split(' ')[0]}",
    )
