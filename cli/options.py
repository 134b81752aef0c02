"""Commands made from their settings: options, `--config`, `--json` and `--quiet`.

A command is a function of its positional arguments, its settings and how to talk to the user.
`command` gives it the options that its settings describe, so no option is written twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dmt_convert.config import (
    Config,
    SettingsError,
    base_type,
    default_text,
    extra_of,
    key_of,
    literals,
    option_name,
    read_settings,
)
from dmt_convert.errors import UsageError

from .console import make_output

Command = Callable[..., None]


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
            run(**mine, config=make_config(kind, values, file), output=output)

        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return wrapper

    return decorate


def make_config(kind: type[Config], options: dict[str, Any], file: Path | None) -> Config:
    """Make the settings of a command: defaults, then the file, then options.

    Args:
        kind: The settings.
        options: Values of options by field name; None, or an empty list, if not given.
        file: The file of `--config`.

    Raises:
        ConfigError: The file is wrong.
        UsageError: An option is wrong.
    """
    keys = {name: key_of(name, field) for name, field in kind.model_fields.items()}
    given = {keys[name]: value for name, value in options.items() if value not in (None, [])}
    settings = {} if file is None else read_settings(file, kind)
    try:
        return kind(**(settings | given))
    except SettingsError as error:
        said = [f"{_shown(name)} {text}".strip() for name, text in error.problems]
        raise UsageError(
            said[0] if len(said) == 1 else f"{len(said)} options are wrong",
            hint=f"dmt {kind.command} --help",
            details=said if len(said) > 1 else (),
        ) from None


def _shown(name: str) -> str:
    return option_name(name) if name else ""


def _parameters(run: Command) -> list[inspect.Parameter]:
    return list(inspect.signature(run, eval_str=True).parameters.values())


def _setting_options(kind: type[Config]) -> Iterable[inspect.Parameter]:
    for name, field in kind.model_fields.items():
        extra, choices = extra_of(field), literals(field.annotation)
        option = option_name(key_of(name, field))
        plain = base_type(field.annotation)
        if plain is list:
            type_: Any = list[str]
        elif choices and not extra["metavar"]:
            type_ = Literal[choices]
        else:
            type_ = str if plain is Path else plain
        switch = plain is bool and (field.default is not False)
        yield _option(
            name,
            type_ | None,
            typer.Option(
                f"{option}/--no-{option[2:]}" if switch else option,
                help=f"{field.description} [{_default(field)}]",
                metavar=extra["metavar"] or ("PATH" if plain is Path else None),
                rich_help_panel=extra["panel"],
                show_default=False,
            ),
        )


def _default(field: Any) -> str:
    if field.is_required() or default_text(field) == "none":
        return "required" if field.is_required() else "default: none"
    return f"default: {default_text(field)}"


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
