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
└── ConfigError           an option, or a model config file, is wrong

Everything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class DmtError(Exception):
    """An error with three parts: what was found, what was expected, what to try.

    Args:
        found: What was found, one line.
        expected: What would have been right.
        hint: What the user can try.
        details: Further findings, one line each, when there are several.
    """

    exit_code: ClassVar[int] = 3
    """Code that `dmt` ends with."""

    def __init__(
        self,
        found: str,
        *,
        expected: str,
        hint: str,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        lines = [self.found, *(f"  - {detail}" for detail in self.details)]
        lines.append(f"expected: {self.expected}")
        lines.append(f"try: {self.hint}")
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
    """An option, or a model config file, is wrong."""
