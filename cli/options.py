"""Commands made from their settings: options, `--config`, `--json` and `--quiet`.

A command is a function of its positional arguments, its settings and how to talk to the user.
`command` gives it the options that its settings describe, so no option is written twice.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dmt_convert.config import (
    Config,
    base_type,
    default_text,
    extra_of,
    key_of,
    literals,
    make_config,
    option_name,
)

from .console import make_output

Command = Callable[..., None]
_PREFIX: Final = "setting_"


def command(kind: type[Config]) -> Callable[[Command], Command]:
    """Make a typer command of a function with the arguments `config` and `output`.

    Args:
        kind: The settings that the function takes as `config`.
    """

    def decorate(run: Command) -> Command:
        own = [p for p in _parameters(run) if p.name not in ("config", "output")]
        added = [*_setting_options(kind), *_COMMON]

        @wraps(run)
        def wrapper(**values: Any) -> None:
            output = make_output(json_=values.pop("json_"), quiet=values.pop("quiet"))
            file = values.pop("config_file")
            mine = {p.name: values.pop(p.name) for p in own}
            run(**mine, config=make_config(kind, _given(kind, values), file), output=output)

        wrapper.__doc__ = run.__doc__ or _docstring(run)
        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return wrapper

    return decorate


def _docstring(run: Command) -> str:
    """Read the help text of a command from its source: `python -OO` drops docstrings."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(run))).body
    except (OSError, SyntaxError, ValueError):
        return ""
    return ast.get_docstring(function) or "" if isinstance(function, ast.FunctionDef) else ""


def _given(kind: type[Config], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that options give, by key; those that were not given are left out."""
    keys = {name: key_of(name, field) for name, field in kind.model_fields.items()}
    given = {name.removeprefix(_PREFIX): value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    turned_off = {name for name in given if kind.model_fields[name].default is True}
    return {keys[name]: name not in turned_off and value for name, value in given.items()}


def _parameters(run: Command) -> list[inspect.Parameter]:
    return list(inspect.signature(run, eval_str=True).parameters.values())


def _setting_options(kind: type[Config]) -> Iterable[inspect.Parameter]:
    for name, field in kind.model_fields.items():
        extra, choices = extra_of(field), literals(field.annotation)
        option = option_name(key_of(name, field))
        plain = base_type(field.annotation)
        # what a value must be is checked by the settings, with the same words for every source
        type_ = list[str] if plain is list else (str if plain is Path else plain)
        if plain is bool and field.default is True:  # such a setting is only ever turned off
            option = f"--no-{option[2:]}"
        elif plain is bool and field.default is None:
            option = f"{option}/--no-{option[2:]}"
        yield _option(
            _PREFIX + name,  # an argument may be called like a setting: MODEL and --model
            type_ | None,
            typer.Option(
                option,
                help=_help(field),
                metavar=extra["metavar"]
                or "|".join(choices)
                or ("PATH" if plain is Path else None),
                rich_help_panel=extra["panel"],
                show_default=False,
            ),
        )


def _help(field: Any) -> str:
    default = default_text(field)
    if default in ("none", "off"):
        return str(field.description)
    return f"{field.description} [{default if default == 'required' else f'default: {default}'}]"


def _option(name: str, type_: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[type_, option],
    )


_COMMON = (
    _option(
        "config_file",
        Path | None,
        typer.Option(
            "--config",
            help="YAML file with settings, or the dmt.json of a bundle. Options override it.",
            metavar="FILE",
            show_default=False,
        ),
    ),
    _option(
        "json_",
        bool,
        typer.Option("--json", help="Print one JSON document on stdout, and nothing else there."),
        False,
    ),
    _option(
        "quiet", bool, typer.Option("--quiet", help="Print no progress and no remarks."), False
    ),
)
