"""Settings that check themselves, and what they say when they are wrong."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dmt_convert.config.fields import base_type, extra_of, key_of, literals
from dmt_convert.errors import ConfigError


class Config(BaseModel):
    """Settings that check themselves when they are made."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        validate_default=False,
        defer_build=True,  # help is shown without building validators
    )
    command: ClassVar[str] = ""
    """The command that takes these settings."""
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Settings of which one is given; an option replaces all of them in a file."""

    def __init__(self, **values: Any) -> None:
        """Check the settings.

        Raises:
            ConfigError: Some are wrong; every one of them is named.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other settings, checked again.

        Raises:
            ConfigError: Some are wrong.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(given | changes))

    def record(self) -> dict[str, Any]:
        """Return the settings that a bundle records, as JSON-able values by YAML key."""
        skipped = {n for n, f in type(self).model_fields.items() if not extra_of(f)["record"]}
        return self.model_dump(mode="json", exclude=skipped, exclude_none=True)


class SettingsError(ConfigError):
    """Settings of a command are wrong.

    Args:
        problems: Setting ("" for several together) and what is wrong with it.
    """

    def __init__(self, problems: Sequence[tuple[str, str]], *, hint: str = "") -> None:
        said = [f"{name} {text}" if name else text for name, text in problems]
        one = len(said) == 1
        super().__init__(
            said[0] if one else f"{len(said)} settings are wrong",
            hint=hint,
            details=() if one else said,
        )
        self.problems = tuple(problems)


def _refusal(kind: type[Config], error: ValidationError) -> SettingsError:
    problems: dict[tuple[str, str], None] = {}
    for found in error.errors():
        name = str(found["loc"][0]) if found["loc"] else ""
        problems[name, _problem(kind, name, found)] = None
    merged: dict[str, str] = {}
    for name, text in problems:  # a union reports every member: one line is enough
        if name not in merged or not name:
            merged[name] = text if name not in merged else f"{merged[name]}; {text}"
    return SettingsError([*merged.items()])


_KINDS: Final = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "path_type": "must be a path",
    "is_instance_of": "must be a path",
}


def _problem(kind: type[Config], name: str, found: Any) -> str:
    """Say what is wrong with one setting, what it must be and what it is."""
    code, context = found["type"], found.get("ctx", {})
    got = "" if isinstance(found["input"], dict | BaseModel) else f", got {_show(found['input'])}"
    if code == "missing":
        return "is missing"
    if code == "extra_forbidden":
        known = [key_of(n, f) for n, f in kind.model_fields.items()]
        near = difflib.get_close_matches(name, known, n=1)
        return "is not a setting" + (f"; did you mean {near[0]}?" if near else "")
    if code == "value_error":
        return str(context["error"])
    if code == "literal_error":
        return f"must be one of {', '.join(literals(_annotation(kind, name)))}{got}"
    for bound, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if bound in context:
            noun = "an integer" if base_type(_annotation(kind, name)) is int else "a number"
            return f"must be {noun} {sign} {context[bound]:g}{got}"
    return _KINDS.get(code, str(found["msg"])) + got


def _show(value: object) -> str:
    return reprlib.repr(str(value) if isinstance(value, Path) else value)


def _annotation(kind: type[Config], name: str) -> Any:
    fields = {key_of(key, field): field for key, field in kind.model_fields.items()}
    return fields[name].annotation
