"""Names of columns: `schema.json` beside a data file, names that only count, names that clash."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import DataError

_COUNTING: Final = r"(.*?)([0-9]{1,9})\]?"
"""A prefix, and the number that a name counts to."""


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
    matches = [re.fullmatch(_COUNTING, name, flags=re.DOTALL) for name in names]
    parts = [(match.group(1), int(match.group(2))) for match in matches if match is not None]
    if not parts or len(parts) != len(names) or len({prefix for prefix, _ in parts}) > 1:
        return None
    first = min(number for _, number in parts)
    columns = tuple(number - first for _, number in parts)
    return columns if first in (0, 1) and sorted(columns) == [*range(len(columns))] else None


def compress_names(names: Sequence[str]) -> str:
    """Write names in order, with `C1..C26` for a run of names that count up by one."""
    return compress_pairs([(name, "") for name in names])


def compress_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    """Write `a -> b` for every pair, with `C1..C26 -> cat_0..cat_25` for a run of both."""
    runs: list[list[tuple[str, str]]] = []
    for pair in pairs:
        if runs and all(map(_follows, runs[-1][-1], pair)):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    parts = []
    for run in runs:
        if len(run) < 3:
            parts += [" -> ".join(filter(None, pair)) for pair in run]
        else:
            ends = zip(run[0], run[-1], strict=True)
            parts.append(" -> ".join(f"{first}..{last}" for first, last in ends if first))
    return ", ".join(parts)


def _follows(name: str, following: str) -> bool:
    if not name and not following:
        return True
    before, after = (re.fullmatch(_COUNTING, text, flags=re.DOTALL) for text in (name, following))
    return (
        before is not None
        and after is not None
        and before.group(1) == after.group(1)
        and int(before.group(2)) + 1 == int(after.group(2))
    )


def check_unique(names: Sequence[str], file: Path) -> tuple[str, ...]:
    """Return the names, or refuse names that appear twice.

    Raises:
        DataError: A name appears twice.
    """
    repeated = _repeated(names)
    if repeated:
        raise DataError(
            f"{file}: feature names that appear twice: {', '.join(repeated)}",
            expected="every feature named once",
            hint="rename the columns",
        )
    return tuple(names)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


SCHEMA_NAME: Final = "schema.json"
LABEL: Final = "label"
"""Name of the column of labels."""
_KEYS: Final = ("dense_features", "features", "sparse_features", "dense_transform")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What the columns of a data set are."""

    file: Path
    """The schema.json."""
    dense_features: tuple[str, ...] | None = None
    """Names of the dense inputs, in their order, if given: these columns and no others."""
    sparse_features: tuple[str, ...] | None = None
    """Names of the categorical features, if given: these columns and no others."""
    dense_transform: str | None = None
    """Name of what is computed from the stored dense inputs, if given."""


def read_schema(folder: Path) -> Schema | None:
    """Read the schema.json of a folder, or return None if it does not exist.

    Raises:
        DataError: The file is not JSON of the expected form, or contradicts itself.
    """
    file = folder / SCHEMA_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise _malformed(file, [str(error) or type(error).__name__]) from error
    if not isinstance(content, dict):
        raise _malformed(file, [f"a {type(content).__name__} at the top"])
    faults = [_misspelt(key) for key in content if key not in _KEYS]
    transform = content.get("dense_transform")
    if not isinstance(transform, str | None):
        faults.append(f"dense_transform is {transform!r}")
    if content.get("features") is not None and content.get("sparse_features") is not None:
        faults.append("features and sparse_features, which mean the same")
    dense, sparse, other = (_names(content, key, faults) for key in _KEYS[:3])
    sparse = other if sparse is None else sparse
    both = [name for name in dense or () if name in (sparse or ())]
    if both:
        faults.append(f"both dense and categorical: {', '.join(both)}")
    faults = [fault for fault in faults if fault]
    if faults:
        raise _malformed(file, faults)
    return Schema(
        file=file, dense_features=dense, sparse_features=sparse, dense_transform=transform
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose keys must differ."""
    repeated = _repeated([key for key, _ in pairs])
    if repeated:
        raise ValueError(f"keys that appear twice: {', '.join(repeated)}")
    return dict(pairs)


def _misspelt(key: str) -> str:
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
    return f"the unknown key {key!r}; did you mean {near[0]}?" if near else ""


def _names(content: dict[str, Any], key: str, faults: list[str]) -> tuple[str, ...] | None:
    entries = content.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list):
        faults.append(f"{key} is a {type(entries).__name__}")
        return None
    names = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
    known = tuple(name for name in names if isinstance(name, str))
    if len(known) < len(names):
        faults.append(f"{key} holds an entry without a name")
    repeated = _repeated(known)
    if repeated:
        faults.append(f"{key} holds names that appear twice: {', '.join(repeated)}")
    if LABEL in known:
        faults.append(f"{key} names the label")
    return known


def _malformed(file: Path, faults: list[str]) -> DataError:
    return DataError(
        f"{file}: {faults[0]}" if len(faults) == 1 else f"{file} has {len(faults)} faults",
        expected='an object with "dense_features" (names, in the order of training) and '
        '"features" (names, or objects with "name")',
        hint="correct the file; docs/data.md describes it",
        details=() if len(faults) == 1 else faults,
    )
