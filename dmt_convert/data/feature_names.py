"""Names of features: when they only count columns, and when they clash."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dmt_convert.errors import DataError


def are_positional(names: Sequence[str]) -> bool:
    """Tell whether names are `<prefix><i>` with i ascending by one from 0 or 1, in order.

    The prefix may be empty: `0`, `1`, ... are positional as well.
    """
    return count_columns(names) == tuple(range(len(names))) != ()


def count_columns(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return which column each name counts, from 0; None where names do not count columns.

    They do where they are `<prefix><i>`, i running from 0 or 1 without gaps, in any order: a model
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
