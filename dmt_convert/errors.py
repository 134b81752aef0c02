"""What a user can mend, as exceptions.

DmtError                  exit code 3, unless it says otherwise
├── CheckpointError       a source cannot be read, or is not what it claims
├── ArchitectureError     tensors are readable but do not form a model we know
├── DataError             a data set cannot be read, or does not fit the model
├── PartitionError        no assignment of features to towers fits the request
├── PlanError             no placement of towers on hosts fits the request
├── BundleError           a bundle cannot be read or written
├── ExportError           an export cannot be made or read
│   └── GraphsDifferError exit code 4: a graph does not answer like the model it came from
└── ConfigError           a setting, or a file of settings, is wrong
    └── UsageError        exit code 2: an option of the command line is wrong

Everything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

_MAX_WORD: Final = 1000
"""Longest word of a message: paths may have some hundred characters."""
_MAX_PART: Final = 20_000
"""Longest part of a message."""
_LONG_WORD: Final = re.compile(rf"\S{{{_MAX_WORD},}}")


class DmtError(Exception):
    """An error with three parts: what was found, what was expected, what to try.

    Args:
        found: What was found, in one line.
        expected: What would have been right; empty if `found` already says it.
        hint: What the user can try; empty if it would only repeat `expected`.
        details: Further findings, one line each, when there are several.
    """

    exit_code: ClassVar[int] = 3
    """Code that `dmt` ends with."""

    def __init__(
        self,
        found: str,
        *,
        expected: str = "",
        hint: str = "",
        details: Sequence[str] = (),
    ) -> None:
        self.found = _shorten(found)
        super().__init__(self.found)
        self.expected = _shorten(expected)
        self.hint = _shorten(hint)
        self.details = tuple(map(_shorten, details))

    def __str__(self) -> str:
        lines = [self.found, *(f"  - {detail}" for detail in self.details)]
        lines += [f"expected: {self.expected}"] if self.expected else []
        lines += [f"try: {self.hint}"] if self.hint else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return the parts as a JSON-able dict, with the class name as `error`."""
        return {
            "error": type(self).__name__,
            "found": self.found,
            "expected": self.expected,
            "hint": self.hint,
            "details": list(self.details),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> DmtError:
        """Rebuild an error from what `to_json` returned, as the class that it names.

        A class that this version does not know becomes a plain `DmtError`.
        """
        kinds = {kind.__name__: kind for kind in _subclasses(DmtError)}
        return kinds.get(str(value["error"]), DmtError)(
            str(value["found"]),
            expected=str(value.get("expected", "")),
            hint=str(value.get("hint", "")),
            details=[str(detail) for detail in value.get("details", ())],
        )


def _shorten(text: str) -> str:
    """Cut long words, such as a name of megabytes in a hostile file, and what is still too long."""
    if len(text) > _MAX_WORD:
        text = _LONG_WORD.sub(lambda word: f"{word[0][:60]}...{word[0][-20:]}", text)
    if len(text) > _MAX_PART:
        text = f"{text[: _MAX_PART - 200]} ... {text[-200:]}"
    return text


def _subclasses(kind: type[DmtError]) -> Iterator[type[DmtError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)


class CheckpointError(DmtError):
    """A source cannot be read, or is not what it claims to be."""


class ArchitectureError(DmtError):
    """Tensors are readable but do not form a model that is known."""


class DataError(DmtError):
    """A data set cannot be read, or does not fit the model."""


class PartitionError(DmtError):
    """No assignment of features to towers fits the request."""


class PlanError(DmtError):
    """No placement of towers on hosts fits the request."""


class BundleError(DmtError):
    """A bundle cannot be read or written."""


class ExportError(DmtError):
    """An export cannot be made or read."""


class GraphsDifferError(ExportError):
    """A graph does not answer like the model it came from."""

    exit_code = 4


class ConfigError(DmtError):
    """A setting, or a file of settings, is wrong."""


class UsageError(ConfigError):
    """An option of the command line is wrong."""

    exit_code = 2
