"""Read a JSON document that says which version of its layout it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dmt_convert.errors import DmtError

Parsed = TypeVar("Parsed")


def read_versioned(
    path: Path,
    parse: Callable[[Mapping[str, Any]], Parsed],
    *,
    version: int,
    absent: DmtError,
    damaged: Callable[[str], DmtError],
    other_version: Callable[[int], DmtError],
) -> Parsed:
    """Read and parse a document.

    Args:
        path: The file.
        parse: Makes of it what it describes; may raise KeyError, TypeError, ValueError and
            AttributeError where a part is not what it should be.
        version: The `schema_version` that is understood.
        absent: What to raise where there is no file.
        damaged: Makes the error for a document that cannot be read, of the reason.
        other_version: Makes the error for another version, of that version.

    Raises:
        DmtError: One of these.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise absent from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(str(error)) from None
    found = value.get("schema_version") if isinstance(value, dict) else None
    if type(found) is not int:
        raise damaged("it has no schema_version")
    if found != version:
        raise other_version(found)
    try:
        return parse(value)
    except DmtError as error:
        raise damaged(error.found) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(repr(error)) from None
