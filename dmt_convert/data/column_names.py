"""Names of columns: `schema.json` beside a data file, names that only count, names that clash."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DataError


def are_positional(names: Sequence[str]) -> bool:
    """Tell whether names are `<prefix><i>` with i ascending by one from 0 or 1, in order.

    The prefix may be empty: `0`, `1`, ... are positional as well.
    """
    return count_columns(names) == tuple(range(len(names))) != ()


def count_columns(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return which column each name counts, from 0; None if names do not count columns.

    They do if they are `<prefix><i>`, i running from 0 or 1 without gaps, in any order: a model
    may take its features in another order than the data hold them (`f9`, `f20`, `f6`, ...).
    """
    matches = [re.fullmatch(r"(.*?)(\d{1,9})", name, flags=re.DOTALL) for name in names]
    parts = [(match.group(1), int(match.group(2))) for match in matches if match is not None]
    if not parts or len(parts) != len(names) or len({prefix for prefix, _ in parts}) > 1:
        return None
    first = min(number for _, number in parts)
    columns = tuple(number - first for _, number in parts)
    return columns if first in (0, 1) and sorted(columns) == [*range(len(columns))] else None


def check_unique(names: Sequence[str], file: Path) -> tuple[str, ...]:
    """Return the names, or refuse names that appear twice.

    Raises:
        DataError: A name appears twice.
    """
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(
            f"{file}: feature names that appear twice: {', '.join(repeated)}",
            expected="every feature named once",
            hint="rename the columns",
        )
    return tuple(names)


SCHEMA_NAME: Final = "schema.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Names of the columns of a data set."""

    file: Path
    """The schema.json."""
    dense_features: tuple[str, ...] | None = None
    """Names of the dense inputs, if given."""
    sparse_features: tuple[str, ...] | None = None
    """Names of the categorical features, if given."""
    dense_transform: str | None = None
    """Name of the transform of raw dense inputs, if given (Criteo TSV only)."""


def read_schema(folder: Path) -> Schema | None:
    """Read the schema.json of a folder, or return None if it does not exist.

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
        hint="correct the file, or move it away to use positional names",
    )
