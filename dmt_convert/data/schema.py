"""The `schema.json` beside a data file: names of its columns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DataError

SCHEMA_NAME: Final = "schema.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Names of the columns of a data set."""

    file: Path
    """The schema.json."""
    dense_features: tuple[str, ...] | None = None
    """Names of the dense inputs, where given."""
    sparse_features: tuple[str, ...] | None = None
    """Names of the categorical features, where given."""
    dense_transform: str | None = None
    """Name of the transform of raw dense inputs, where given (Criteo TSV only)."""


def read_schema(folder: Path) -> Schema | None:
    """Read the schema.json of a folder, or return None where there is none.

    Raises:
        DataError: The file is not JSON of the expected form.
    """
    file = folder / SCHEMA_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _malformed(file, str(error)) from error
    if not isinstance(content, dict):
        raise _malformed(file, f"a {type(content).__name__} at the top")
    transform = content.get("dense_transform")
    if not isinstance(transform, str | None):
        raise _malformed(file, f"dense_transform is {transform!r}")
    return Schema(
        file=file,
        dense_features=_names(file, content, "dense_features"),
        sparse_features=_names(file, content, "sparse_features"),
        dense_transform=transform,
    )


def _names(file: Path, content: dict[str, Any], key: str) -> tuple[str, ...] | None:
    entries = content.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise _malformed(file, f"{key} is a {type(entries).__name__}")
    names = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
    known = tuple(name for name in names if isinstance(name, str))
    if len(known) < len(names):
        raise _malformed(file, f"{key} holds an entry without a name")
    return known


def _malformed(file: Path, found: str) -> DataError:
    return DataError(
        f"{file}: {found}",
        expected='an object with "dense_features" (names) and "sparse_features" '
        '(objects with "name")',
        hint="mend the file, or move it away to use positional names",
    )
