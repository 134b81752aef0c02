"""One setting: how it is declared, and what its declaration says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field


def setting(default: Any, help_: str, **more: Any) -> Any:
    """Declare a setting.

    Args:
        default: Its default; `...` if it must be given.
        help_: What it does, in one or two sentences.
        **more: `auto` (what None comes to), `metavar`, `panel` (heading in `--help`), `record`
            (False: how to run, not what to make, so no bundle records it), and bounds and `alias`
            as pydantic's `Field` takes them.
    """
    extra: dict[str, Any] = {
        key: more.pop(key) for key in ("auto", "metavar", "panel", "record") if key in more
    }
    return Field(default, description=help_, json_schema_extra=extra, **more)


def extra_of(field: Any) -> dict[str, Any]:
    """Return what `setting` was told beside pydantic's own: auto, metavar, panel, record."""
    said = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return {"auto": "", "metavar": None, "panel": None, "record": True, **said}


def option_name(key: str) -> str:
    """Return the option of a setting: `table_lr` is `--table-lr`."""
    return "--" + key.replace("_", "-")


def key_of(name: str, field: Any) -> str:
    """Return what a setting is called outside Python: in YAML, and as an option."""
    return field.alias or name


def literals(annotation: Any) -> tuple[str, ...]:
    """Return the strings that an annotation allows, from all its Literals."""
    found: list[str] = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else literals(part)
    return tuple(dict.fromkeys(found))


def base_type(annotation: Any) -> type:
    """Return the plain type of a setting: bool, int, float, Path, str; list for several values."""
    members = set(_members(annotation))
    if members & {tuple, dict} and Path not in members:  # a file may also be given as its content
        return list
    kinds: tuple[type, ...] = (bool, int, float, Path)
    return next((kind for kind in kinds if kind in members), str)


def _members(annotation: Any) -> Iterable[Any]:
    yield get_origin(annotation) or annotation
    if get_origin(annotation) not in (tuple, dict, Literal):
        for part in get_args(annotation):
            yield from _members(part)


def noun(annotation: Any) -> str:
    """Return what a value of a setting is called: integer, number, path."""
    nouns = {int: "integer", float: "number", bool: "true | false", Path: "path", list: "list"}
    return nouns.get(base_type(annotation), "text")


def default_text(field: Any) -> str:
    """Return the default of a setting as people read it."""
    if field.is_required():
        return "required"
    auto = extra_of(field)["auto"]
    if auto:
        return str(auto)
    value = field.default
    if value is None or (isinstance(value, dict | tuple) and not value):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
